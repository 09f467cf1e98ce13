-- Waits until no other transaction changes the tables, and lets none change them until this transaction ends.
--
-- psql -X -v ON_ERROR_STOP=1 -1 -f sql/database/lock_tables.sql "$DATABASE_URL"
LOCK TABLE tasks, idempotency_keys IN SHARE ROW EXCLUSIVE MODE;
