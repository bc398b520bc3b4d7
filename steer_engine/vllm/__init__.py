"""Every contact with vLLM: one file per patched area, and both plugin entry points."""
