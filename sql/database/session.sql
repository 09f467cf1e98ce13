-- Returns "on" if the server accepted the session's settings, and null if a pooler dropped them.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/session.sql "$DATABASE_URL"
SELECT current_setting('todo.session', TRUE) AS session;
