"""The arms: each loads a model in its own way and runs loads on it. One process each; see `child`."""
