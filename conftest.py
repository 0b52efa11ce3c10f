"""Which modules' doctests are collected: those of an optional package only where it is installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["dpdl/federated/flower/*"]
