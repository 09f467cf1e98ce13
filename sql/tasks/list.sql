-- Lists the tasks of a user that match the filters, newest first, a page at a time.
--
-- There are two branches, and one of them reads nothing. The first one lists open tasks, through the index of open
-- tasks. The second one lists all tasks, or the completed ones. One condition for all three cases could not use that
-- index, because the plan of the statement is made without the values of the parameters.
--
-- user_id    text     the owner of the tasks (default in psql: local)
-- limit      integer  the largest number of tasks (default in psql: 50)
-- completed  text     true or false; '' for both (default in psql: '')
-- q          text     a substring of the title or the description, case-insensitive; '' for all (default in psql: '')
-- after      text     the cursor: created_at, in microseconds since 1970, and id of the last task before the page,
--                     joined by _; this task may be deleted by now (default in psql: a time in the year 10000)
--
-- psql -X -v ON_ERROR_STOP=1 -v completed=false -v q=milk -v limit=5 -f sql/tasks/list.sql "$DATABASE_URL"
\if :{?user_id} \else \set user_id local \endif
\if :{?limit} \else \set limit 50 \endif
\if :{?completed} \else \set completed '' \endif
\if :{?q} \else \set q '' \endif
\if :{?after} \else \set after 253402300800000000_1 \endif
(
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
        NOT nullif(:'completed'::text, '')::boolean
        AND user_id = :'user_id'::text
        AND NOT completed
        -- One comparison of two rows, which the index supports: a page takes the same time, wherever it starts.
        AND (created_at, id) < (
            -- Seconds and microseconds are separate, because PostgreSQL multiplies intervals in double precision:
            -- microseconds alone are inexact from the year 2255 on.
            'epoch'::timestamptz
            + split_part(:'after'::text, '_', 1)::bigint / 1000000 * interval '1 second'
            + split_part(:'after'::text, '_', 1)::bigint % 1000000 * interval '1 microsecond',
            split_part(:'after'::text, '_', 2)::bigint
        )
        -- Not ILIKE, because % and _ are wildcards there.
        AND (
            :'q'::text = ''
            OR strpos(lower(title), lower(:'q'::text)) > 0
            OR strpos(lower(description), lower(:'q'::text)) > 0
        )
    ORDER BY created_at DESC, id DESC
    LIMIT :'limit'::integer
)
UNION ALL
(
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
        nullif(:'completed'::text, '')::boolean IS NOT FALSE
        AND user_id = :'user_id'::text
        AND (:'completed'::text = '' OR completed)
        AND (created_at, id) < (
            'epoch'::timestamptz
            + split_part(:'after'::text, '_', 1)::bigint / 1000000 * interval '1 second'
            + split_part(:'after'::text, '_', 1)::bigint % 1000000 * interval '1 microsecond',
            split_part(:'after'::text, '_', 2)::bigint
        )
        AND (
            :'q'::text = ''
            OR strpos(lower(title), lower(:'q'::text)) > 0
            OR strpos(lower(description), lower(:'q'::text)) > 0
        )
    ORDER BY created_at DESC, id DESC
    LIMIT :'limit'::integer
)
ORDER BY created_at DESC, id DESC
LIMIT :'limit'::integer;
