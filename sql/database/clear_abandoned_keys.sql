-- Deletes up to 1000 idempotency keys of a user that are older than 48 hours. abandoned_keys.sql says when it runs.
--
-- user_id  text  the owner of the keys (default in psql: local)
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/clear_abandoned_keys.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
DELETE FROM idempotency_keys
WHERE
    user_id = :'user_id'::text
    AND key IN (
        SELECT old.key
        FROM idempotency_keys AS old
        WHERE
            old.user_id = :'user_id'::text
            AND old.created_at < now() - interval '48 hours'
        ORDER BY old.created_at
        LIMIT 1000
        -- Another worker, or a create of this user, may be deleting them.
        FOR UPDATE SKIP LOCKED
    );
