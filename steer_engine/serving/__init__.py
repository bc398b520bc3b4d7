"""The API side: the request field, its answers, routes, the middleware and the `serve` command."""
