-- Returns what flask check tells of the server: its version, its encoding, whether it accepts writes, the size of this
-- database, the connections that the role of this session may still open, and those that services have opened as it.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/server.sql "$DATABASE_URL"
WITH
sessions AS (
    SELECT
        count(*) FILTER (WHERE usename = session_user)::int AS of_role,
        count(*) FILTER (WHERE datname = current_database())::int AS of_database,
        count(*) FILTER (
            WHERE usename = session_user AND datname = current_database() AND application_name = 'todo_api'
        )::int AS of_services
    FROM pg_stat_activity
),

all_sessions AS (
    SELECT sum(numbackends)::int AS number
    FROM pg_stat_database
)

SELECT
    current_setting('server_version') AS version,
    current_setting('server_encoding') AS encoding,
    current_setting('transaction_read_only') = 'off' AS accepts_writes,
    pg_size_pretty(pg_database_size(databases.oid)) AS size,
    least(
        current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', TRUE)::int, 0) -- since PostgreSQL 16
        - all_sessions.number,
        nullif(roles.rolconnlimit, -1) - sessions.of_role,
        nullif(databases.datconnlimit, -1) - sessions.of_database
    ) AS free_connections,
    sessions.of_services AS service_connections
FROM pg_roles AS roles
CROSS JOIN pg_database AS databases
CROSS JOIN sessions
CROSS JOIN all_sessions
WHERE
    roles.rolname = session_user
    AND databases.datname = current_database();
