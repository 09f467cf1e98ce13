-- Returns true if a server process waits for a lock or for a synchronous standby.
--
-- pid        int   the process; 0 if it is unknown, as behind a pooler: then any process that runs the statement counts
-- statement  text  the SQL that the process runs
--
-- psql -X -v ON_ERROR_STOP=1 -v pid=1 -v statement='SELECT 1' -f sql/database/waits.sql "$DATABASE_URL"
SELECT coalesce(bool_or(wait_event_type = 'Lock' OR wait_event = 'SyncRep'), FALSE) AS waits
FROM pg_stat_activity
WHERE
    state = 'active'
    AND pid <> pg_backend_pid()
    AND (
        pid = :'pid'::int
        -- PostgreSQL shows only the first 1023 bytes of a statement.
        OR (:'pid'::int = 0 AND query <> '' AND starts_with(:'statement'::text, query))
    );
