-- Creates a task, and returns it.
--
-- task     jsonb  {"title": string, "description": string or null, "completed": boolean}; only the title is required
-- user_id  text   the owner of the task (default in psql: local)
--
-- psql -X -v ON_ERROR_STOP=1 -v task='{"title": "Buy milk"}' -f sql/tasks/create.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
INSERT INTO tasks (user_id, title, description, completed, version, created_at, updated_at)
SELECT
    :'user_id'::text AS user_id,
    body.task ->> 'title' AS title,
    body.task ->> 'description' AS description,
    coalesce((body.task -> 'completed')::boolean, FALSE) AS completed,
    1 AS version,
    now() AS created_at,
    now() AS updated_at
FROM (SELECT :'task'::jsonb::new_task AS task) AS body
RETURNING
    id,
    title,
    description,
    completed,
    user_id,
    version,
    created_at,
    updated_at;
