-- Returns one row if the database can be reached and its tables exist.
-- The user '' is nobody, so this reads no row, and one server of a Citus cluster is enough.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/ready.sql "$DATABASE_URL"
SELECT count(*) AS ready
FROM tasks
CROSS JOIN idempotency_keys
WHERE
    tasks.user_id = ''
    AND idempotency_keys.user_id = '';
