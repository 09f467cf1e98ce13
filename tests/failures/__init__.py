"""What only the whole system shows, while something fails or too much is asked of it."""
