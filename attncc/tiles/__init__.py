"""Plans at the lengths and arguments of one call: classes of tiles, counts, evaluated ranges."""

from attncc.tiles.bound import BoundPlan
from attncc.tiles.classes import EMPTY, FULL, PARTIAL
from attncc.tiles.counts import Counts, Density
from attncc.tiles.segments import SegmentTable

__all__ = ["EMPTY", "FULL", "PARTIAL", "BoundPlan", "Counts", "Density", "SegmentTable"]
