"""The parts of `scripts/fuzz_routes.py`: corpus, mutations, raw sockets, verdicts, sending and the server."""
