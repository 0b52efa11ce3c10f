"""Opacus 1.6's public names on this library's parts: change the import, keep the script.

    from dpdl.compat.opacus import PrivacyEngine

docs/compat_opacus.md says what differs, and why.
"""

from dpdl.compat.opacus import utils
from dpdl.compat.opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from dpdl.compat.opacus.privacy_engine import PrivacyEngine

__all__ = ["GradSampleModule", "GradSampleModuleFastGradientClipping", "PrivacyEngine", "utils"]
