"""Triton kernels of our own, imported only where a GPU and Triton are there."""
