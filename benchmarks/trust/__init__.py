"""Exact problems on which numbers, their errors and warnings are judged: `python -m benchmarks.trust`."""
