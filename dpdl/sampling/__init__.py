"""From a dataset to batches: which examples a step draws, and how they are loaded."""

from dpdl.sampling.loader import PhysicalBatches
from dpdl.sampling.poisson import PoissonSampler

__all__ = ["PhysicalBatches", "PoissonSampler"]
