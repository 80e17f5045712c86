"""A model becomes a traced program: where it comes from, what is supported, its tensors, its FX graph."""
