"""Which layers prefill skips, and what takes their place. README.md says how, and what else was tried."""
