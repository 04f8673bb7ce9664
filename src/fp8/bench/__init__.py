"""Benchmarks: one file an operation, beside BF16 and beside peers where they are installed."""
