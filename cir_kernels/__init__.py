"""Tensor operations of Collapse of Irrelevant Representations (CIR, arXiv 2509.11816).

Tensors in, tensors out: nothing here knows about models. Every operation has a Triton kernel for CUDA devices and
a PyTorch form, in ``cir_kernels.reference``, for everything else; the functions exported here check their
arguments and run the one that fits, or the one that ``backend=`` or CIR_KERNELS_BACKEND asks for.
"""

from cir_kernels import _trials  # noqa: F401 (what kernels have to show on a GPU)
from cir_kernels.collapse import collapse
from cir_kernels.moments import Moments, accumulate_moments, new_moments
from cir_kernels.outer import Group, outer_norm_sq, outer_update_
from cir_kernels.rounding import ROUNDINGS
from cir_kernels.scatter import accumulate_scatter, symmetric

__all__ = [
    "ROUNDINGS",
    "Group",
    "Moments",
    "accumulate_moments",
    "accumulate_scatter",
    "collapse",
    "new_moments",
    "outer_norm_sq",
    "outer_update_",
    "symmetric",
]
