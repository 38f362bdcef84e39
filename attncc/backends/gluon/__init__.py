"""Warp-specialised kernels for Hopper GPUs (sm_90), printed from a Plan in Triton's Gluon."""
