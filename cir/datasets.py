"""The documented name of :func:`load_data`, which is in :mod:`cir.data.datasets`."""

from cir.data.datasets import load_data

__all__ = ["load_data"]
