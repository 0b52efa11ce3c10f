"""Noise: from a clipped sum to a noisy gradient and its privacy event."""

from dpdl.noise.gaussian import MAX_NORMAL, gaussian_mechanism, standard_normals

__all__ = ["MAX_NORMAL", "gaussian_mechanism", "standard_normals"]
