-- Returns the command that loads rows into a table of the service, or null if there is no such table or column.
--
-- name     text   the name of the table, without its schema
-- columns  jsonb  the names of the columns, in the order in which the rows have their values
--
-- psql -X -v ON_ERROR_STOP=1 -v name=tasks -v columns='["id", "title"]' \
--     -f sql/database/copy_command.sql "$DATABASE_URL"
WITH
given AS (
    SELECT
        names.name,
        names.position
    FROM jsonb_array_elements_text(:'columns'::jsonb) WITH ORDINALITY AS names (name, position)
),

tables AS (
    SELECT pg_class.oid
    FROM pg_class
    WHERE
        pg_class.oid IN (to_regclass('tasks'), to_regclass('idempotency_keys'))
        AND pg_class.relname = :'name'::text
),

columns AS (
    SELECT
        pg_attribute.attrelid,
        pg_attribute.attname
    FROM pg_attribute
    INNER JOIN tables ON pg_attribute.attrelid = tables.oid
    WHERE
        pg_attribute.attnum > 0
        AND NOT pg_attribute.attisdropped
)

SELECT
    CASE
        WHEN count(columns.attname) = count(*)
            THEN
                format(
                    'COPY %s (%s) FROM STDIN',
                    min(columns.attrelid)::regclass,
                    string_agg(quote_ident(columns.attname), ', ' ORDER BY given.position)
                )
    END AS command
FROM given
LEFT JOIN columns ON given.name = columns.attname;
