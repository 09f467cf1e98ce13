-- Flips the field completed of a task, and returns the task.
-- Returns no row if the user has no such task, or if its version is not in if_match.
--
-- task_id   bigint    the id of the task
-- user_id   text      the owner of the task (default in psql: local)
-- if_match  bigint[]  the versions at which the task may be changed; '{}' for any (default in psql: '{}')
--
-- psql -X -v ON_ERROR_STOP=1 -v task_id=1 -f sql/tasks/toggle.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?if_match} \else \set if_match '{}' \endif
UPDATE tasks
SET
    completed = NOT completed,
    version = version + 1,
    -- The clock may stand still or go back, but updated_at must increase. A sum of times with time zone would depend on
    -- the session's time zone, and Citus rejects that in SET.
    updated_at = greatest(now(), (updated_at AT TIME ZONE 'UTC' + interval '1 microsecond') AT TIME ZONE 'UTC')
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
