"""Noise: from a clipped sum to a noisy gradient and its privacy event."""

from dpdl.noise.gaussian import gaussian_mechanism
from dpdl.noise.normals import MAX_NORMAL, standard_normals, total_variation

__all__ = ["MAX_NORMAL", "gaussian_mechanism", "standard_normals", "total_variation"]
