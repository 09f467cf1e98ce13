-- Lets the server read its configuration files again, pg_hba.conf among them. Only a superuser may do this.
--
-- psql -X -v ON_ERROR_STOP=1 -f sql/database/reload.sql "$DATABASE_URL"
SELECT pg_reload_conf();
