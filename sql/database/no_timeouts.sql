-- Lets the rest of the transaction take as long as it needs, whatever the defaults of the database and the role are.
-- Only a wait for a lock is limited, because statements of a running service wait behind it.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/no_timeouts.sql "$DATABASE_URL"
SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN '10s' ELSE '0' END, TRUE) AS timeout
FROM pg_settings
WHERE
    name IN (
        'lock_timeout', 'statement_timeout', 'idle_in_transaction_session_timeout',
        'transaction_timeout' -- since PostgreSQL 17
    );
