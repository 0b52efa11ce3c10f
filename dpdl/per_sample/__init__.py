"""Per-sample gradients: rows of arguments, engines, the border to the user's loss, and their checks."""

from dpdl.per_sample.api import clipped_sum, per_sample_gradients, per_sample_norms

__all__ = ["clipped_sum", "per_sample_gradients", "per_sample_norms"]
