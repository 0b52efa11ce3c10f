"""Flat clipping: one L2 norm over all parameters of an example."""

from __future__ import annotations

import torch
from torch import Tensor

from dpdl.errors import ParameterError

__all__ = ["flat_weights"]

# A norm over d numbers whose squares are added in a tree is off by at most log2(d) / 2 + 1 roundings (16 for
# d = 2^30); the quotient, the product with the weight and their sum over the vector add a few. 32 is more.
ROUNDINGS = 32


def flat_weights(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """Weights that bring each per-sample gradient to L2 norm at most max_grad_norm.

    w_n = min(1, C / ||g_n||_2)                              [1, Algorithm 1]

    The quotient is taken of C (1 - 32 u), u the unit roundoff of `norms`: rounding in the norm and in
    the product then stays on the safe side of C.

    Args:
        norms: L2 norm of each per-sample gradient, shape [N], unit: loss per parameter unit.
        max_grad_norm: C > 0, same unit as norms. May be infinite: every finite weight is then 1.

    Returns:
        Weights, shape [N], dtype of norms, in [0, 1]. A non-finite norm gives weight 0.

    Guarantee:
        sum_n w_n g_n moves by at most C in L2 norm when one example is added or removed.

    Raises:
        ParameterError: max_grad_norm is not positive.

    Example:
        >>> flat_weights(torch.tensor([0.5, 2.0]), max_grad_norm=1.0)
        tensor([1.0000, 0.5000])

    References:
        [1] Abadi et al., Deep Learning with Differential Privacy, CCS 2016. arXiv:1607.00133
    """
    if not max_grad_norm > 0:
        raise ParameterError(
            f"max_grad_norm must be > 0, got {max_grad_norm}. To train without clipping, leave the model unwrapped."
        )
    resolution = torch.finfo(norms.dtype)
    bound = max_grad_norm * (1 - ROUNDINGS * resolution.eps)
    # Division before the choice: norm 0 gives infinity, which the choice turns into 1.
    weights = torch.where(norms <= bound, 1.0, bound / norms.double())
    # Below the normal numbers a weight has lost digits, and could exceed what it stands for.
    usable = torch.isfinite(norms) & (weights >= resolution.tiny)
    return torch.where(usable, weights, 0.0).to(norms.dtype)
