"""What steers inside an engine: store, bank, programs, routing and the op. Only `runtime.vllm` knows vLLM."""
