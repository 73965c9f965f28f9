"""Sweeps of faults: `python -m tests.faults` runs them whole, the tests a few of each."""
