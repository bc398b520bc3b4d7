"""The arms. Each loads a model with one engine and runs loads on it, in its own process; see `child`."""
