-- Creates a task, unless its idempotency key was used before, and returns the task as it was created.
-- A retry returns this task again, even if it was changed or deleted in between. Returns no row if the key was used
-- with another task. A key is kept for at least 24 hours; each run deletes up to 10 older keys of the same user. The
-- keys of users who do not come back are cleared in the background: see sql/database/abandoned_keys.sql.
--
-- task             jsonb  as in create.sql
-- idempotency_key  text   the key that the client chose for this request, 1 to 255 characters
-- user_id          text   the owner of the task and of the key (default in psql: local)
--
-- psql -X -v ON_ERROR_STOP=1 -v idempotency_key=1 -v task='{"title": "a"}' -f sql/tasks/create_once.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
WITH
given AS (
    SELECT
        :'idempotency_key'::text AS key,
        :'task'::jsonb::new_task AS task,
        nextval(pg_get_serial_sequence('tasks', 'id')) AS task_id,
        now() AS created_at
),

expired AS (
    DELETE FROM idempotency_keys
    WHERE
        user_id = :'user_id'::text
        AND key IN (
            SELECT old.key
            FROM idempotency_keys AS old
            WHERE
                old.user_id = :'user_id'::text
                AND old.created_at < now() - interval '24 hours'
                -- One statement cannot delete a row here and update it below.
                AND old.key <> :'idempotency_key'::text
            ORDER BY old.created_at
            LIMIT 10
            FOR UPDATE SKIP LOCKED
        )
),

-- The row of the first request with this key. A concurrent second request waits here until the first one has ended,
-- and then finds its row. The update changes no value. Without it, PostgreSQL would not return a row that was committed
-- while this statement waited.
kept AS (
    INSERT INTO idempotency_keys AS known (user_id, key, task, task_id, created_at)
    SELECT
        :'user_id'::text AS user_id,
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
        :'user_id'::text AS user_id,
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
