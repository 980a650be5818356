"""An HTTP server in front of a generator, for clients that speak OpenAI's API, Ollama's or Anthropic's."""
