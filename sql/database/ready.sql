-- Returns one row if the database can be reached and its tables exist.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/ready.sql "$DATABASE_URL"
SELECT count(*) AS ready
FROM tasks
CROSS JOIN idempotency_keys
WHERE FALSE;
