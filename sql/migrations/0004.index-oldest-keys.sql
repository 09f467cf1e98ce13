-- depends: 0003.enable-row-level-security
-- Finds the idempotency keys of users who do not come back: sql/database/abandoned_keys.sql looks for the oldest keys,
-- whoever has them.

CREATE INDEX idempotency_keys_oldest_first ON idempotency_keys (created_at);
