"""`make demo`: a real model behind an OpenAI-compatible server, with and without steering, and scored answers."""
