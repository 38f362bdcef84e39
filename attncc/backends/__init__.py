"""Backends: dense defines a Program's meaning, cpu and triton run Plans."""
