-- Flips a task's completed and shows the task; no row where the user has no such task.
--
-- task_id   bigint    which task
-- user_id   text      whose task (psql: local)
-- if_match  bigint[]  only if the task is at one of these versions; '{}' for any (psql: '{}')
--
-- psql -X -v ON_ERROR_STOP=1 -v task_id=1 -f sql/tasks/toggle.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?if_match} \else \set if_match '{}' \endif
UPDATE tasks
SET
    completed = NOT completed,
    version = version + 1,
    -- The clock may stand still or go back; updated_at must not.
    updated_at = greatest(now(), updated_at + interval '1 microsecond')
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
