"""Benchmarks: ``python -m bench.cpu``."""
