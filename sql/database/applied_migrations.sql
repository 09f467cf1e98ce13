-- Lists the applied migrations, oldest first, each with the checksum of its file.
-- The checksum is null if yoyo's own command applied the migration.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/applied_migrations.sql "$DATABASE_URL"
SELECT
    applied.migration_id,
    (
        SELECT log.comment
        FROM _yoyo_log AS log
        WHERE
            log.migration_id = applied.migration_id
            AND log.operation = 'apply'
        ORDER BY log.created_at_utc DESC
        LIMIT 1
    ) AS checksum
FROM _yoyo_migration AS applied
ORDER BY applied.applied_at_utc, applied.migration_id;
