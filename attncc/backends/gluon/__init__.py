"""Warp-specialised kernels for Hopper GPUs (sm_90), printed from a Plan in Triton's Gluon."""

CHOSEN: bool = False
"""Whether a call that leaves its backend open takes them where they serve it.

Not yet: their numerics on a GPU are to be gone through as they stand.
"""
