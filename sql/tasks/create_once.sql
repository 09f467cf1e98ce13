-- Creates a task unless this key did so before, and shows the task as it was when it was created: a request that is
-- sent again gets the first answer again, whatever became of the task. No row where the key came with another task.
-- A key is kept for 24 hours at least; each call clears a few that are older.
--
-- task             jsonb  as in create.sql
-- idempotency_key  text   the client's name for this request, 1 to 255 characters
-- user_id          text   whose task, and whose key (psql: local)
--
-- psql -X -v ON_ERROR_STOP=1 -v idempotency_key=1 -v task='{"title": "a"}' -f sql/tasks/create_once.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
WITH
given AS (
    SELECT
        :'user_id'::text AS user_id,
        :'idempotency_key'::text AS key,
        :'task'::jsonb::new_task AS task,
        nextval(pg_get_serial_sequence('tasks', 'id')) AS task_id,
        now() AS created_at
),

expired AS (
    DELETE FROM idempotency_keys
    WHERE
        (user_id, key) IN (
            SELECT
                old.user_id,
                old.key
            FROM idempotency_keys AS old
            WHERE
                old.created_at < now() - interval '24 hours'
                -- A row can't be deleted here and kept below.
                AND (old.user_id, old.key) <> (:'user_id'::text, :'idempotency_key'::text)
            ORDER BY old.created_at
            LIMIT 10
            FOR UPDATE SKIP LOCKED
        )
),

-- The first request's row, whoever comes first: a second one waits here until the first is done, and finds it. The
-- update changes nothing; without it, PostgreSQL would not show a row that was committed while this statement waited.
kept AS (
    INSERT INTO idempotency_keys AS known (user_id, key, task, task_id, created_at)
    SELECT
        given.user_id,
        given.key,
        given.task,
        given.task_id,
        given.created_at
    FROM given
    ON CONFLICT (user_id, key) DO UPDATE SET key = excluded.key
    RETURNING known.user_id, known.task, known.task_id, known.created_at
),

created AS (
    INSERT INTO tasks (id, user_id, title, description, completed, version, created_at, updated_at)
    OVERRIDING SYSTEM VALUE
    SELECT
        given.task_id,
        given.user_id,
        given.task ->> 'title' AS title,
        given.task ->> 'description' AS description,
        coalesce((given.task -> 'completed')::boolean, FALSE) AS completed,
        1 AS version,
        given.created_at,
        given.created_at AS updated_at
    FROM given
    INNER JOIN kept ON given.task_id = kept.task_id
)

SELECT
    kept.task_id AS id,
    kept.task ->> 'title' AS title,
    kept.task ->> 'description' AS description,
    coalesce((kept.task -> 'completed')::boolean, FALSE) AS completed,
    kept.user_id,
    1::bigint AS version,
    kept.created_at,
    kept.created_at AS updated_at
FROM kept
WHERE kept.task = :'task'::jsonb;
