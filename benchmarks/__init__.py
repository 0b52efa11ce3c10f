"""Speed, memory, accuracy and accounting, measured against named alternatives; results in `results/`."""
