"""Finds the best schedule of each kernel of a call, each trial in a process of its own."""
