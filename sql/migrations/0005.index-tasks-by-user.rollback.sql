CREATE UNIQUE INDEX tasks_by_id ON tasks (id);

ALTER TABLE tasks
DROP CONSTRAINT tasks_pkey,
ADD CONSTRAINT tasks_pkey PRIMARY KEY USING INDEX tasks_by_id;

DROP INDEX tasks_open_newest_first;
