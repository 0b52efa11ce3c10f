"""Runs whose next step depends on what was released: filters, odometers, accounting by example."""
