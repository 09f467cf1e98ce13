-- Answers one row when the database can be reached and its table of tasks is there.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/ready.sql "$DATABASE_URL"
SELECT count(*) AS ready
FROM tasks
WHERE FALSE;
