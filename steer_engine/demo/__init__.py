"""`make demo`: one real model, answering plainly and steered through an OpenAI-compatible server, and scored."""
