-- Returns true if row-level security holds for the current role. It does not for the tables' owner, who sees every row.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/isolation.sql "$DATABASE_URL"
SELECT row_security_active('tasks') AND row_security_active('idempotency_keys') AS holds;
