-- Returns true if the tables are shared out over the servers of a Citus cluster. Fails in a database without Citus.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/shared_out.sql "$DATABASE_URL"
SELECT count(*) > 0 AS is_shared_out
FROM pg_dist_partition
WHERE logicalrelid IN (to_regclass('tasks'), to_regclass('idempotency_keys'));
