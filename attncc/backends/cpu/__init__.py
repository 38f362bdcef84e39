"""The CPU backend: runs a BoundPlan in strips of queries with torch operations."""

from attncc.backends.cpu.autograd import attention
from attncc.backends.cpu.schedule import NARROW as TILE
from attncc.backends.cpu.schedule import retiled

__all__ = ["TILE", "attention", "retiled"]
