"""Many runs from one command: who runs them and in which order, what is known when it ends."""
