"""deepee 0.1.9's public names, with this library's engines, noise and accounting behind them.

    from dpdl.compat.deepee import PrivacyWatchdog, PrivacyWrapper, UniformDataLoader      # was: from deepee import ...

A script moves over by changing its import, submodules included (`deepee.surgery` is `dpdl.compat.deepee.surgery`).
What differs, and why: docs/compat_deepee.md. New programs are better served by `dpdl.make_private`.
"""

from dpdl.compat.deepee.dataloader import UniformDataLoader
from dpdl.compat.deepee.snooper import ModelSnooper
from dpdl.compat.deepee.surgery import ModelSurgeon, SurgicalProcedures
from dpdl.compat.deepee.watchdog import PrivacyWatchdog
from dpdl.compat.deepee.wrapper import PerSampleGradientWrapper, PrivacyWrapper

__all__ = [
    "ModelSnooper",
    "ModelSurgeon",
    "PerSampleGradientWrapper",
    "PrivacyWatchdog",
    "PrivacyWrapper",
    "SurgicalProcedures",
    "UniformDataLoader",
    "__version__",
]

__version__ = "0.1.9"  # of deepee, whose names these are
