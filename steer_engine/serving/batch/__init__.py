"""`steer-engine batch`: OpenAI batch files through the server's own handlers, without a socket."""
