"""A common alternative: the same six calls on the same table with FastAPI, SQLModel and asyncpg."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import StrictBool, StringConstraints
from sqlalchemy import TIMESTAMP, BigInteger, Column, Identity
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlmodel import Field, SQLModel, desc, select, tuple_
from sqlmodel.ext.asyncio.session import AsyncSession

USER = "local"

engine = create_async_engine(os.environ["SQLALCHEMY_URL"])
sessions = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


def now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


class Task(SQLModel, table=True):
    """A row of the table, and the body of a response."""

    __tablename__ = "tasks"

    id: int | None = Field(default=None, sa_column=Column(BigInteger, Identity(always=True), primary_key=True))
    title: str
    description: str | None = None
    completed: bool = False
    user_id: str = USER
    version: int = 1
    created_at: datetime = Field(default_factory=now, sa_type=TIMESTAMP(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=TIMESTAMP(timezone=True))


Title = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Description = Annotated[str, StringConstraints(max_length=2000)]


class NewTask(SQLModel, extra="forbid"):
    """The body of a create."""

    title: Title
    description: Description | None = None
    completed: StrictBool = False


class TaskChanges(SQLModel, extra="forbid"):
    """The body of a change."""

    title: Title | None = None
    description: Description | None = None
    completed: StrictBool | None = None


async def get_session() -> AsyncIterator[AsyncSession]:
    """Yield a session for one request."""
    async with sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]
app = FastAPI()


async def find(session: AsyncSession, task_id: int, *, lock: bool = False) -> Task:
    """Return a task of the user, or respond with a 404."""
    query = select(Task).where(Task.id == task_id, Task.user_id == USER)
    task = (await session.exec(query.with_for_update() if lock else query)).first()
    if task is None:
        raise HTTPException(404)
    return task


async def save(session: AsyncSession, task: Task) -> Task:
    """Save a changed task and return it."""
    task.version += 1
    task.updated_at = now()
    session.add(task)
    await session.commit()
    return task


@app.get("/api/tasks")
async def list_tasks(session: Session, limit: int = 10_000, after: str | None = None) -> list[Task]:
    """Return tasks, newest first."""
    query = select(Task).where(Task.user_id == USER).order_by(desc(Task.created_at), desc(Task.id)).limit(limit)
    if after:
        microseconds, _, task_id = after.partition("_")
        moment = datetime.fromtimestamp(int(microseconds) / 1e6, UTC)
        query = query.where(tuple_(Task.created_at, Task.id) < tuple_(moment, int(task_id)))
    return list((await session.exec(query)).all())


@app.post("/api/tasks", status_code=201)
async def create_task(new: NewTask, session: Session) -> Task:
    """Create a task and return it."""
    task = Task(**new.model_dump())
    session.add(task)
    await session.commit()
    return task


@app.get("/api/tasks/{task_id}")
async def get_task(task_id: int, session: Session) -> Task:
    """Return a task."""
    return await find(session, task_id)


@app.patch("/api/tasks/{task_id}")
async def update_task(task_id: int, changes: TaskChanges, session: Session) -> Task:
    """Change a task and return it."""
    task = await find(session, task_id, lock=True)
    task.sqlmodel_update(changes.model_dump(exclude_unset=True))
    return await save(session, task)


@app.delete("/api/tasks/{task_id}")
async def delete_task(task_id: int, session: Session) -> Task:
    """Delete a task and return it."""
    task = await find(session, task_id, lock=True)
    await session.delete(task)
    await session.commit()
    return task


@app.post("/api/tasks/{task_id}/toggle")
async def toggle_task(task_id: int, session: Session) -> Task:
    """Invert ``completed`` of a task, and return the task."""
    task = await find(session, task_id, lock=True)
    task.completed = not task.completed
    return await save(session, task)
