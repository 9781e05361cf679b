"""Kernels of our own: in Triton for a GPU, in C for the CPU. Each has a form in torch operations beside it."""
