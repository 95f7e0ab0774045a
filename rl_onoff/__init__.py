"""rl_onoff tells how on-policy your tokens are: sample with one engine, score under another, compare token by token."""

__version__ = "0.1.0"
