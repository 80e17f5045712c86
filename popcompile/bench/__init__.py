"""How fast a package answers. This file imports nothing: what a worker process holds is what is measured."""
