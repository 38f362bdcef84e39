"""The CPU backend: runs a BoundPlan in strips of queries with torch operations."""

from attncc.backends.cpu.autograd import TILE, attention

__all__ = ["TILE", "attention"]
