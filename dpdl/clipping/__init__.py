"""From norms to weights: how much of each example's gradient enters the sum."""

from dpdl.clipping.flat import flat_weights

__all__ = ["flat_weights"]
