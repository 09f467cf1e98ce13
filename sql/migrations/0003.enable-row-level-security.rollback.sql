ALTER TABLE tasks DISABLE ROW LEVEL SECURITY;

DROP POLICY rows_of_user ON tasks;

ALTER TABLE idempotency_keys DISABLE ROW LEVEL SECURITY;

DROP POLICY rows_of_user ON idempotency_keys;

CREATE INDEX idempotency_keys_oldest_first ON idempotency_keys (created_at);

DROP INDEX idempotency_keys_of_user_oldest_first;

ALTER TABLE idempotency_keys DROP CONSTRAINT user_id_is_1_to_255_characters;
