"""Tiny vision-language models that are really trained, in minutes on one core: a Qwen3-VL and a Gemma-3."""
