-- depends: 0004.index-abandoned-keys
-- Each key begins with the user, so that the table can be shared out by user, and a page of open tasks takes the same
-- time however many tasks the user has finished.
--
-- Writes wait while the indexes are built; reads do not. If the table is large, build them before, while the service
-- runs: sql/README.md has the commands. Then this migration builds nothing.

-- An interrupted build leaves an index that is invalid.
DO $$
DECLARE
    invalid text;
BEGIN
    SELECT string_agg(indexrelid::regclass::text, ', ' ORDER BY indexrelid)
    INTO invalid
    FROM pg_index
    WHERE
        indexrelid IN (to_regclass('tasks_open_newest_first'), to_regclass('tasks_by_user'))
        AND NOT indisvalid;
    IF invalid IS NOT NULL THEN
        RAISE EXCEPTION 'the build of the index % was interrupted: drop the index', invalid;
    END IF;
END $$;

-- "This user's open tasks, newest first".
CREATE INDEX IF NOT EXISTS tasks_open_newest_first ON tasks (user_id, created_at DESC, id DESC) WHERE NOT completed;

CREATE UNIQUE INDEX IF NOT EXISTS tasks_by_user ON tasks (user_id, id);

-- Only this needs a lock against reads, for a moment. The index gets the name of the key.
ALTER TABLE tasks
DROP CONSTRAINT tasks_pkey,
ADD CONSTRAINT tasks_pkey PRIMARY KEY USING INDEX tasks_by_user;
