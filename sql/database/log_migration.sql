-- Records in yoyo's log that a migration was applied, with the checksum of its file.
--
-- migration_id  text  the name of the file without .sql
-- checksum      text  the SHA-256 of the file's text
-- hostname      text  the host that applied it
--
-- psql -X -v ON_ERROR_STOP=1 -v migration_id=0001.create-tasks -v checksum=… -v hostname=… \
--     -f sql/database/log_migration.sql "$DATABASE_URL"
INSERT INTO _yoyo_log (id, migration_id, migration_hash, operation, username, hostname, comment, created_at_utc)
SELECT
    gen_random_uuid() AS id,
    migration_id,
    migration_hash,
    'apply' AS operation,
    current_user AS username,
    :'hostname'::text AS hostname,
    :'checksum'::text AS comment,
    applied_at_utc AS created_at_utc
FROM _yoyo_migration
WHERE migration_id = :'migration_id'::text;
