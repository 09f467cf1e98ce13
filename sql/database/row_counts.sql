-- Returns the number of tasks and of idempotency keys, of all users.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/row_counts.sql "$DATABASE_URL"
SELECT
    (SELECT count(*) FROM tasks) AS tasks,
    (SELECT count(*) FROM idempotency_keys) AS idempotency_keys;
