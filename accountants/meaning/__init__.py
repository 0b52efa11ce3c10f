"""What a bound means: trade-off curves, the best attacks, comparison of two plans."""
