"""What steering costs, measured side by side with plain vLLM and with peers: see `benchmarks/README.md`."""
