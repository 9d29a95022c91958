"""Generative models, as Pyro models, one family per file."""
