-- yoyo runs these in this order.
DROP TABLE tasks;

DROP DOMAIN new_task;

DROP DOMAIN task_changes;
