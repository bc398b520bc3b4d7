"""The API process: what requests ask for, the routes, the middleware and the metrics. No vLLM."""
