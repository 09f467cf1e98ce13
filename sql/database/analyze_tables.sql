-- Lets PostgreSQL count what is in the tables, so that it plans for the rows that were just loaded.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/analyze_tables.sql "$DATABASE_URL"
ANALYZE tasks, idempotency_keys;
