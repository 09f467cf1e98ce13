"""The embedded PostgreSQL, which runs if there is no DATABASE_URL."""
