-- Returns one task, or no row if the user has no such task.
--
-- task_id  bigint  the id of the task
-- user_id  text    the owner of the task (default in psql: local)
--
-- psql -X -v ON_ERROR_STOP=1 -v task_id=1 -f sql/tasks/get.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
SELECT
    id,
    title,
    description,
    completed,
    user_id,
    version,
    created_at,
    updated_at
FROM tasks
WHERE
    user_id = :'user_id'::text
    AND id = :'task_id'::bigint;
