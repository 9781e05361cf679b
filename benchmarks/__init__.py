"""Benchmarks: scripts with stored results under results/. Nothing here is imported by the library or timed by tests."""
