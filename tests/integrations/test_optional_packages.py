"""The modules can be imported without the packages that they are for, and say which one is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpdl.integrations.lightning import private_training
from tests.small_run import small_run

PACKAGES = ("lightning", "pytorch_lightning", "transformers", "accelerate", "peft")


@pytest.mark.parametrize("module", ["lightning", "transformers", "accelerate"])
def test_a_module_needs_no_package_to_be_imported(module: str) -> None:
    blocked = "; ".join(f"sys.modules['{name}'] = None" for name in PACKAGES)
    program = f"import sys; {blocked}; import dpdl.integrations.{module}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"Install dpdl\[lightning\]"):
        private_training(small_run(), delta=1e-3)
