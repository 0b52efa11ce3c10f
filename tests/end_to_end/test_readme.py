"""The README's example, and its commands' options, as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example_runs_and_prints_the_promised_epsilon(tmp_path: Path) -> None:
    script = ROOT / "tests" / "end_to_end" / "readme_example.py"
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "README.md")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    claim = re.match(r"epsilon <= (\d\.\d\d) at delta = 1e-05, adding or removing one example; ", done.stdout)
    assert claim is not None, done.stdout
    assert 2.9 < float(claim.group(1)) <= 3.0


@pytest.mark.parametrize("command", ["train", "epsilon", "calibrate"])
def test_every_command_of_the_readme_explains_itself(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpdl", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    for line in re.findall(rf"^    dpdl {command} (.*?)(?:#.*)?$", readme, flags=re.MULTILINE):
        for option in re.findall(r"--[a-z-]+", line):
            assert option in done.stdout, f"{option} is in the README but not in dpdl {command} --help"
