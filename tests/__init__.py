"""The tests; the README has the command that runs them."""
