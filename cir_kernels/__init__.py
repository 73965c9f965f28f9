"""Tensor operations of Collapse of Irrelevant Representations (CIR, arXiv 2509.11816).

Tensors in, tensors out: nothing here knows about models. ``cir_kernels.reference`` holds the plain
PyTorch form of every operation; the functions exported here check their arguments and run it.
"""

from cir_kernels.collapse import collapse
from cir_kernels.moments import Moments, accumulate_moments, new_moments
from cir_kernels.outer import outer_norm_sq, outer_update_

__all__ = [
    "Moments",
    "accumulate_moments",
    "collapse",
    "new_moments",
    "outer_norm_sq",
    "outer_update_",
]
