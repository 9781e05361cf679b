"""Benchmarks: scripts with stored results under results/. Nothing here is imported by the library or timed by tests."""

import frankenstein  # before torch: it sets what OpenMP reads when torch loads it

__all__ = ["frankenstein"]
