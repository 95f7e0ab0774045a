"""A run folder: tables of rows, what made them, and what they say."""
