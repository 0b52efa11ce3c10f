"""Runs the README's first code block as it stands, in whatever environment this file is run with.

python readme_example.py README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def example_of(readme: Path) -> str:
    """The first Python block of a README."""
    block = re.search(r"^```python\n(.*?)^```$", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    if block is None:
        raise SystemExit(f"{readme} has no Python block.")
    return block.group(1)


if __name__ == "__main__":
    exec(compile(example_of(Path(sys.argv[1])), sys.argv[1], "exec"))
