-- Returns the number of tasks of all users.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/task_count.sql "$DATABASE_URL"
SELECT count(*) AS tasks
FROM tasks;
