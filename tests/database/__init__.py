"""What the database does: statements, psql, rules, migrations and plans; and the URLs that lead to one."""
