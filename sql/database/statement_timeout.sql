-- Returns the statement timeout of the session, which shows whether the server accepted the session's settings.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/statement_timeout.sql "$DATABASE_URL"
SELECT current_setting('statement_timeout') AS statement_timeout;
