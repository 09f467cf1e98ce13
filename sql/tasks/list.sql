-- Lists a user's tasks, newest first: all, or those that the filters let through, a page at a time.
--
-- user_id    text     whose tasks (psql: local)
-- limit      integer  how many at most, 1 to 10000 (psql: 50)
-- completed  text     true or false: only such tasks; '' for both (psql: '')
-- q          text     only tasks with this in the title or the description, in capitals or not; '' for all (psql: '')
-- after      text     where the page before ended: its last task's created_at, in microseconds since 1970, and id, with
--                     _ between (psql: the year 10000); that task may be gone by now
--
-- psql -X -v ON_ERROR_STOP=1 -v completed=false -v q=milk -v limit=5 -f sql/tasks/list.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?limit} \else \set limit 50 \endif
\if :{?completed} \else \set completed '' \endif
\if :{?q} \else \set q '' \endif
\if :{?after} \else \set after 253402300800000000_1 \endif
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
WHERE
    user_id = :'user_id'::text
    -- One comparison of two rows, which the index answers: a page costs the same wherever it begins.
    AND (created_at, id) < (
        -- In two parts, since PostgreSQL multiplies as double precision: microseconds alone are inexact from 2255 on.
        'epoch'::timestamptz
        + split_part(:'after'::text, '_', 1)::bigint / 1000000 * interval '1 second'
        + split_part(:'after'::text, '_', 1)::bigint % 1000000 * interval '1 microsecond',
        split_part(:'after'::text, '_', 2)::bigint
    )
    AND (:'completed'::text = '' OR completed = nullif(:'completed'::text, '')::boolean)
    -- Not ILIKE, in which % and _ would mean more than themselves.
    AND (
        :'q'::text = ''
        OR strpos(lower(title), lower(:'q'::text)) > 0
        OR strpos(lower(description), lower(:'q'::text)) > 0
    )
ORDER BY created_at DESC, id DESC
LIMIT :'limit'::integer;
