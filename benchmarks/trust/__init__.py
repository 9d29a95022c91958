"""Exact problems on which the library's numbers, their errors and its warnings are judged: `python -m benchmarks.trust`."""
