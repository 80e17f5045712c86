"""A package behind OpenAI's HTTP API: requests, prompts, an engine whose requests take turns, answers, and the app."""
