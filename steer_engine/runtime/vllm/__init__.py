"""Every contact with the engine side of vLLM."""
