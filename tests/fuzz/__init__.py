"""A fuzz harness: thousands of damaged inputs, each run as a command in a process of its own (README.md here)."""
