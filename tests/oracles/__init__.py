"""Slow, plain computations that the tests believe. Nothing in here imports `dpdl` or `accountants`."""
