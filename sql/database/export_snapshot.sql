-- Lets other sessions see the database as this transaction sees it, and returns the name under which they find it.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/export_snapshot.sql "$DATABASE_URL"
SELECT pg_export_snapshot() AS snapshot;
