"""Measured on a GPU: ``python -m benchmarks.gpu``."""
