"""Benchmarks of steering, compared with plain vLLM and with peers. See `benchmarks/README.md`."""
