-- Waits until no other process migrates this database, and takes the lock for migrations.
-- The lock ends with the transaction. So a killed process leaves no lock behind, and a pooler in transaction mode does
-- not keep it on a connection that another client uses.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/migration_lock.sql "$DATABASE_URL"
SELECT pg_advisory_xact_lock(hashtext('todo_api migrations')) AS waited;
