-- Returns how many connections the role of this session may have to this database.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/connection_limit.sql "$DATABASE_URL"
SELECT
    CASE
        WHEN roles.rolsuper THEN current_setting('max_connections')::int
        ELSE
            least(
                current_setting('max_connections')::int
                - current_setting('superuser_reserved_connections')::int
                - coalesce(current_setting('reserved_connections', TRUE)::int, 0), -- since PostgreSQL 16
                nullif(roles.rolconnlimit, -1),
                nullif(databases.datconnlimit, -1)
            )
    END AS connection_limit
FROM pg_roles AS roles
CROSS JOIN pg_database AS databases
WHERE
    roles.rolname = session_user
    AND databases.datname = current_database();
