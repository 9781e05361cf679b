"""Import the package before torch: it sets what OpenMP reads when torch loads it."""

import frankenstein

__all__ = ["frankenstein"]
