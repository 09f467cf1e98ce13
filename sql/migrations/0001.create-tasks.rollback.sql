-- yoyo runs these from the last to the first.
DROP TABLE tasks;

DROP DOMAIN task_changes;

DROP DOMAIN new_task;
