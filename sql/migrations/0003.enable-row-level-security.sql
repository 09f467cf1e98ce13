-- depends: 0002.create-idempotency-keys
-- Makes the database itself keep users apart: every role but the tables' owner sees and changes only the rows of the
-- user that it names in the setting todo.user_id, and no rows if it names none.

-- A setting that was set once is '' afterwards, so '' must be nobody. tasks has this rule already.
ALTER TABLE idempotency_keys
ADD CONSTRAINT user_id_is_1_to_255_characters CHECK (char_length(user_id) BETWEEN 1 AND 255);

-- A user can see and delete only their own expired keys.
CREATE INDEX idempotency_keys_of_user_oldest_first ON idempotency_keys (user_id, created_at);

DROP INDEX idempotency_keys_oldest_first;

-- The expression has no sub-select: engines that share tables out over servers accept none.
CREATE POLICY rows_of_user ON idempotency_keys USING (user_id = current_setting('todo.user_id', TRUE));

ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY;

CREATE POLICY rows_of_user ON tasks USING (user_id = current_setting('todo.user_id', TRUE));

ALTER TABLE tasks ENABLE ROW LEVEL SECURITY;
