"""`python -m dpdl`."""

from dpdl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
