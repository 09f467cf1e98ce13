-- Makes the rest of the transaction run as a role, for a user. Statements then see and change only the rows of this
-- user. Unless DATABASE_ROLE is empty, the service sends this file's statement before each statement for a request, in
-- the same transaction.
--
-- role     text  the role, which owns no table; the service takes it from DATABASE_ROLE
-- user_id  text  the user; '' for nobody, who has no rows
--
-- psql -X -v ON_ERROR_STOP=1 -v role=todo_app -v user_id=local -f sql/database/identify.sql "$DATABASE_URL"
SELECT
    set_config('role', :'role'::text, TRUE) AS role,
    set_config('todo.user_id', :'user_id'::text, TRUE) AS user_id;
