"""A parser whose usage errors look like those of the commands themselves."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """`ArgumentParser` with errors of one line, on stderr, and exit code 2; subparsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")
