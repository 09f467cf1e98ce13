-- depends: 0001.create-tasks
-- What clients called the requests that created tasks, so that a request that is sent again creates nothing more.

CREATE TABLE idempotency_keys (
    user_id text NOT NULL,
    key text NOT NULL,
    task jsonb NOT NULL,
    -- No foreign key: the task may be deleted, and its key must stay, lest a late retry bring it back.
    task_id bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, key),
    CONSTRAINT key_is_1_to_255_characters CHECK (char_length(key) BETWEEN 1 AND 255)
);

CREATE INDEX idempotency_keys_oldest_first ON idempotency_keys (created_at);
