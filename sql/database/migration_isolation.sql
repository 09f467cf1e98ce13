-- Sets the isolation level READ COMMITTED for the transaction that applies the migrations.
-- The default of the database may be stricter. Then the statements after the wait for the lock would not see what was
-- committed during the wait.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/migration_isolation.sql "$DATABASE_URL"
SET LOCAL transaction_isolation = 'read committed';
