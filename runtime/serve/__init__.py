"""A server with OpenAI's interface: a scheduler of requests, the thread that runs it, and HTTP in front."""
