"""Variational families, as Pyro guides, one family per file."""
