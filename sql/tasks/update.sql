-- Changes the members of a task that are given (JSON Merge Patch, RFC 7396) and shows it; no row where the user has
-- no such task. Changes that leave the task as it is leave version and updated_at as they are.
--
-- task_id   bigint    which task
-- changes   jsonb     any of {"title": string, "description": string or null, "completed": boolean}
-- user_id   text      whose task (psql: local)
-- if_match  bigint[]  only if the task is at one of these versions; '{}' for any (psql: '{}')
--
-- psql -X -v ON_ERROR_STOP=1 -v task_id=1 -v changes='{"completed": true}' -f sql/tasks/update.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?if_match} \else \set if_match '{}' \endif
UPDATE tasks
SET
    (title, description, completed, version, updated_at) = (
        WITH
        body AS (SELECT :'changes'::jsonb::task_changes AS changes),

        wanted AS (
            SELECT
                coalesce(body.changes ->> 'title', tasks.title) AS title,
                CASE
                    WHEN body.changes ? 'description' THEN body.changes ->> 'description'
                    ELSE tasks.description
                END AS description,
                coalesce((body.changes -> 'completed')::boolean, tasks.completed) AS completed
            FROM body
        ),

        compared AS (
            SELECT
                wanted.title,
                wanted.description,
                wanted.completed,
                (wanted.title, wanted.completed) <> (tasks.title, tasks.completed)
                OR (wanted.description IS DISTINCT FROM tasks.description) AS differs
            FROM wanted
        )

        SELECT
            compared.title,
            compared.description,
            compared.completed,
            CASE WHEN compared.differs THEN tasks.version + 1 ELSE tasks.version END AS version,
            CASE
                -- The clock may stand still or go back; updated_at must not.
                WHEN compared.differs THEN greatest(now(), tasks.updated_at + interval '1 microsecond')
                ELSE tasks.updated_at
            END AS updated_at
        FROM compared
    )
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
