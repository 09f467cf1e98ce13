-- Answers the time limit of the session's statements, which shows whether the server took what it was asked for.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/session.sql "$DATABASE_URL"
SELECT current_setting('statement_timeout') AS statement_timeout;
