-- Returns true if the database has Citus, which can share tables out over several servers.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/citus.sql "$DATABASE_URL"
SELECT count(*) > 0 AS has_citus
FROM pg_extension
WHERE extname = 'citus';
