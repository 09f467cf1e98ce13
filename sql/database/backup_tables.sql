-- Lists the tables whose rows a backup has: those of the service, and yoyo's record of the applied migrations.
-- is_hidden is true if row-level security hides rows of the table from the current role.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/backup_tables.sql "$DATABASE_URL"
SELECT
    format('%s.%I', tables.relnamespace::regnamespace, tables.relname) AS name,
    row_security_active(tables.oid) AS is_hidden
FROM pg_class AS tables
WHERE
    tables.oid IN (to_regclass('tasks'), to_regclass('idempotency_keys'), to_regclass('_yoyo_migration'))
    OR tables.oid IN (SELECT parts.relid FROM pg_partition_tree(to_regclass('tasks')) AS parts)
    OR tables.oid IN (SELECT parts.relid FROM pg_partition_tree(to_regclass('idempotency_keys')) AS parts)
ORDER BY name;
