"""For the process that clients are forked from: takes part once, so that none of them loads what that needs."""

from __future__ import annotations

import os
import tempfile

from tests.federated.clients.killed import take_part

WARM = "DPDL_TESTS_WARM_UP"  # set for that process; whoever else imports this does nothing

if WARM in os.environ:
    with tempfile.TemporaryDirectory() as folder:
        take_part(folder, seed=1)
