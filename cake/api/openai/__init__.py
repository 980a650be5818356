"""The dialect of OpenAI's API: chat completions, plain completions, models."""
