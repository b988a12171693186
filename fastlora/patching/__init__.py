"""patch, unpatch, patched, explain."""

from .engine import NotFused, explain, patch, patched, unpatch
from .plan import Plan, Row

__all__ = ["NotFused", "Plan", "Row", "explain", "patch", "patched", "unpatch"]
