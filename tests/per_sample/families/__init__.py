"""The small models, by the kind of trouble they make for a per-sample gradient engine."""
