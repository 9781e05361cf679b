"""Sequence mixers: one file each, with the plain operator, the fast operator and the layer."""
