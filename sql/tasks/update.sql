-- Changes the given fields of a task (JSON Merge Patch, RFC 7396), and returns the task.
-- Returns no row if the user has no such task, or if its version is not in if_match.
-- If no value changes, version and updated_at stay the same.
--
-- task_id   bigint    the id of the task
-- changes   jsonb     any fields of {"title": string, "description": string or null, "completed": boolean}
-- user_id   text      the owner of the task (default in psql: local)
-- if_match  bigint[]  the versions at which the task may be changed; '{}' for any (default in psql: '{}')
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
                -- As in toggle.sql.
                WHEN compared.differs
                    THEN greatest(
                        now(), (tasks.updated_at AT TIME ZONE 'UTC' + interval '1 microsecond') AT TIME ZONE 'UTC'
                    )
                ELSE tasks.updated_at
            END AS updated_at
        FROM compared
    )
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
