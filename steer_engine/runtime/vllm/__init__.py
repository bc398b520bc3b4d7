"""Every patch of vLLM's engine side, one file per class patched; `register` is the plugin that applies them."""
