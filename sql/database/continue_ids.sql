-- Lets the ids of new tasks go on at a number, or later if they already are beyond it or a task has it.
--
-- next_id  bigint  the number
--
-- psql -X -v ON_ERROR_STOP=1 -v next_id=1 -f sql/database/continue_ids.sql "$DATABASE_URL"
SELECT
    setval(
        ids.sequence,
        greatest(
            :'next_id'::bigint,
            pg_sequence_last_value(ids.sequence) + 1, -- null if no id was given yet
            (SELECT max(tasks.id) + 1 FROM tasks) -- in case that the backup's number is damaged
        ),
        FALSE
    ) AS next_id
FROM (SELECT pg_get_serial_sequence('tasks', 'id')::regclass AS sequence) AS ids;
