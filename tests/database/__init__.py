"""The database: the statements and their plans, psql, constraints, migrations, the pool and connection URLs."""
