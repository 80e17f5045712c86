"""A package behind OpenAI's HTTP API: requests, prompts, an engine that decodes answers in batches, and the app."""
