"""Private training inside of other trainers. Each module needs its package; importing this one needs none.

`dpdl.integrations.lightning`, `dpdl.integrations.transformers` and `dpdl.integrations.accelerate`.
"""
