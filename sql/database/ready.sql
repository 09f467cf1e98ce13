-- Returns one row if the database can be reached and the table of tasks exists.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/ready.sql "$DATABASE_URL"
SELECT count(*) AS ready
FROM tasks
WHERE FALSE;
