"""Tokens and the key sets that verify them."""
