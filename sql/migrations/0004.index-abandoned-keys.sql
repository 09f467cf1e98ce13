-- depends: 0003.enable-row-level-security
-- Finds the idempotency keys of users who do not come back: sql/database/abandoned_keys.sql looks for the oldest keys,
-- whoever has them.

-- An index of created_at itself would also serve the clean-up in sql/tasks/create_once.sql, and PostgreSQL sometimes
-- chooses it there. Then a request reads the old keys of all users until it finds ten of its own.
CREATE INDEX idempotency_keys_abandoned ON idempotency_keys ((created_at AT TIME ZONE 'UTC'));
