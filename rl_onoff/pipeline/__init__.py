"""The stages of a run, and the one engine that is alive while they work."""
