-- Deletes a task and shows it as it last was; no row where the user has no such task.
--
-- task_id   bigint    which task
-- user_id   text      whose task (psql: local)
-- if_match  bigint[]  only if the task is at one of these versions; '{}' for any (psql: '{}')
--
-- psql -X -v ON_ERROR_STOP=1 -v task_id=1 -f sql/tasks/delete.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?if_match} \else \set if_match '{}' \endif
DELETE FROM tasks
WHERE
    id = :'task_id'::bigint
    AND user_id = :'user_id'::text
    AND (:'if_match'::bigint[] = '{}' OR version = any(:'if_match'::bigint[]))
RETURNING
    id,
    title,
    description,
    completed,
    user_id,
    version,
    created_at,
    updated_at;
