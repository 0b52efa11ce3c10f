"""From a dataset to batches: which examples a step draws, and how they are loaded."""

from dpdl.sampling.loader import PhysicalBatches
from dpdl.sampling.poisson import PoissonSampler
from dpdl.sampling.tensor_rows import by_rows

__all__ = ["PhysicalBatches", "PoissonSampler", "by_rows"]
