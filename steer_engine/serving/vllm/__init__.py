"""Every patch of vLLM's API side, one file per class patched; `symbols.py` lists them all."""
