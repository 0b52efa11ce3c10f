"""Ways to use the library wrongly, and what happens."""
