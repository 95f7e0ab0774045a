"""Where an engine runs: in a process of its own, or in a pool of them."""
