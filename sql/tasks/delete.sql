-- Deletes a task, and returns it as it was before.
-- Returns no row if the user has no such task, or if its version is not in if_match.
--
-- task_id   bigint    the id of the task
-- user_id   text      the owner of the task (default in psql: local)
-- if_match  bigint[]  the versions at which the task may be deleted; '{}' for any (default in psql: '{}')
--
-- psql -X -v ON_ERROR_STOP=1 -v task_id=1 -f sql/tasks/delete.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?if_match} \else \set if_match '{}' \endif
DELETE FROM tasks
WHERE
    user_id = :'user_id'::text
    AND id = :'task_id'::bigint
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
