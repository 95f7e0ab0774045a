"""Is this model on this engine fit to be trained? A fixed list of checks, each with its number and its bar."""
