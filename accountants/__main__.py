"""Entry point of `python -m accountants`."""

import sys

from accountants.cli import main

sys.exit(main())
