-- Lists a user's tasks, newest first.
--
-- user_id  text     whose tasks (psql: local)
-- limit    integer  how many at most, 1 to 10000 (psql: 50)
--
-- psql -X -v ON_ERROR_STOP=1 -v limit=5 -f sql/tasks/list.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?limit} \else \set limit 50 \endif
SELECT
    id,
    title,
    description,
    completed,
    user_id,
    version,
    created_at,
    updated_at
FROM tasks
WHERE user_id = :'user_id'::text
ORDER BY created_at DESC, id DESC
LIMIT :'limit'::integer;
