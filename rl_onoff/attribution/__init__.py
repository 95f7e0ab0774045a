"""Why two policies differ: a ladder of causes, tried one at a time."""
