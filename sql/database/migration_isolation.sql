-- Lets the statements that follow the wait for the lock see what others committed meanwhile, also where the database's
-- default is a stricter level, with which they would see the time before the wait.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/migration_isolation.sql "$DATABASE_URL"
SET LOCAL transaction_isolation = 'read committed';
