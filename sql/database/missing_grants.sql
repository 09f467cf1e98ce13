-- Returns the commands that are still needed for the role of this session to work as another role. They grant that role
-- only the rights that the statements in tasks/ need. Returns '' if there are none, or if the other role is too
-- powerful: a superuser, a role of PostgreSQL's own, or one for which row-level security does not hold.
--
-- role       text     the other role; the service takes it from DATABASE_ROLE (default in psql: todo_app)
-- only_role  boolean  true for the commands that make the role, without those for the tables (default in psql: false)
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/missing_grants.sql "$DATABASE_URL"
\if :{?role} \else \set role todo_app \endif
\if :{?only_role} \else \set only_role false \endif
WITH
role AS (
    SELECT
        given.name,
        roles.oid,
        session_user AS login,
        -- Since PostgreSQL 16, a membership says whether its member may use SET ROLE.
        current_setting('server_version_num')::int >= 160000 AS has_set_option
    FROM (SELECT :'role'::text AS name) AS given
    LEFT JOIN pg_roles AS roles ON given.name = roles.rolname
    LEFT JOIN pg_class AS owned ON owned.oid = to_regclass('tasks')
    WHERE
        roles.oid IS NULL
        OR NOT (
            roles.rolsuper
            OR roles.rolbypassrls
            OR starts_with(roles.rolname, 'pg_')
            OR coalesce(roles.oid = owned.relowner, FALSE)
        )
),

-- No table exists before the first migration.
guarded AS (
    SELECT
        tables.oid,
        format('%s.%I', tables.relnamespace::regnamespace, tables.relname) AS name,
        tables.relnamespace::regnamespace AS schema
    FROM pg_class AS tables
    WHERE
        NOT :'only_role'::boolean
        AND tables.oid IN (to_regclass('tasks'), to_regclass('idempotency_keys'))
),

-- create_once.sql takes its ids from the sequence itself.
ids AS (
    SELECT
        CASE
            WHEN NOT :'only_role'::boolean AND to_regclass('tasks') IS NOT NULL
                THEN pg_get_serial_sequence('tasks', 'id')
        END AS sequence
),

missing AS (
    SELECT
        1 AS step,
        format('CREATE ROLE %I NOLOGIN', role.name) AS command
    FROM role
    WHERE role.oid IS NULL
    UNION ALL
    SELECT
        2 AS step,
        format('GRANT %I TO %I', role.name, role.login)
        || CASE WHEN role.has_set_option THEN ' WITH SET TRUE, INHERIT FALSE' ELSE '' END AS command
    FROM role
    WHERE
        pg_has_role(role.login, role.oid, CASE WHEN role.has_set_option THEN 'SET' ELSE 'MEMBER' END) IS NOT TRUE
    UNION ALL
    SELECT DISTINCT
        3 AS step,
        format('GRANT USAGE ON SCHEMA %s TO %I', guarded.schema, role.name) AS command
    FROM role
    CROSS JOIN guarded
    WHERE
        NOT coalesce(
            has_schema_privilege(role.oid, guarded.schema, 'USAGE'),
            has_schema_privilege('public', guarded.schema, 'USAGE') -- what every role may do, a new one too
        )
    UNION ALL
    SELECT
        4 AS step,
        format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', guarded.name, role.name) AS command
    FROM role
    CROSS JOIN guarded
    WHERE
        (
            has_table_privilege(role.oid, guarded.oid, 'SELECT')
            AND has_table_privilege(role.oid, guarded.oid, 'INSERT')
            AND has_table_privilege(role.oid, guarded.oid, 'UPDATE')
            AND has_table_privilege(role.oid, guarded.oid, 'DELETE')
        ) IS NOT TRUE
    UNION ALL
    SELECT
        5 AS step,
        format('GRANT USAGE ON SEQUENCE %s TO %I', ids.sequence, role.name) AS command
    FROM role
    CROSS JOIN ids
    WHERE
        ids.sequence IS NOT NULL
        AND has_sequence_privilege(role.oid, ids.sequence, 'USAGE') IS NOT TRUE
)

SELECT coalesce(string_agg(missing.command, '; ' ORDER BY missing.step, missing.command), '') AS commands
FROM missing;
