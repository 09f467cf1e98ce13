-- Lists the users who have the oldest idempotency keys of more than 48 hours, one row for each key, at most 1000.
--
-- A key is kept for at least 24 hours, and create_once.sql clears the older ones of its own user. So these are keys of
-- users who do not come back. No request pays for them: after a create with a key, at most once an hour (once a minute
-- while there are 1000), a worker runs this statement in the background, and then clear_abandoned_keys.sql for each of
-- the users. It does so as the tables' owner, because nobody else sees the keys of all users, and on a connection that
-- it closes at the end.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/abandoned_keys.sql "$DATABASE_URL"
SELECT user_id
FROM idempotency_keys
WHERE created_at AT TIME ZONE 'UTC' < now() AT TIME ZONE 'UTC' - interval '48 hours' -- as in the index
ORDER BY created_at AT TIME ZONE 'UTC'
LIMIT 1000;
