-- Shares the tables out by user over the servers of a Citus cluster (Citus 13 or newer), with the tasks and the
-- idempotency keys of a user on the same server. An operator runs it once; the service never does. It changes nothing
-- else: all keys begin with user_id already.
--
-- Before: apply the migrations of this version, install Citus on the coordinator and its workers, and add the workers
-- (SELECT citus_add_node('host', 5432)). Set DATABASE_ROLE to nothing, and restart the service: row-level security
-- does not reach the workers, and the service looks for Citus when it starts.
-- Meanwhile: writes wait until the rows are copied, and fail after half a second with a 503.
-- After: the coordinator keeps a copy of the rows, which nobody sees. This frees the room:
-- SELECT truncate_local_data_after_distributing_table('tasks')
--
-- Run it on the coordinator, as the tables' owner. -1 makes it one transaction: if it fails, nothing has changed.
--
-- psql -X -v ON_ERROR_STOP=1 -1 -f sql/citus/distribute.sql "$DATABASE_URL"
SELECT create_distributed_table('tasks', 'user_id');

SELECT create_distributed_table('idempotency_keys', 'user_id', colocate_with => 'tasks');
