"""Other programs that rl_onoff is fed by."""
