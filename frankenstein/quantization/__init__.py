"""Ternary weights and int8 activations: training arithmetic, conversion, packing, packed runtime, artifact."""
