"""What ops take out of caches, for whoever has to keep it."""

from fastfpl.kernels.lifetime import keep, kept

__all__ = ["keep", "kept"]
