"""What steers inside an engine: admission in the engine core; bank, programs and the op in a worker. No vLLM."""
