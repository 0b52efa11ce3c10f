"""What of the pages' code is not run as it stands, each with the reason. All else runs in the default tests.

Blocks are named by page and first line, commands by a pattern that the whole command matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["APART", "COMMANDS", "GIVEN", "NEEDS", "NOT_CODE", "NOT_RUN", "SLOW_PAGES", "Treated", "treatment"]

# Pages of which each section is a program of its own.
APART = frozenset({"integrations.md"})

# What a program needs: by page, or page#section. Skipped where it is not installed.
NEEDS: Mapping[str, Sequence[str]] = {
    "flower.md": ("flwr",),
    "integrations.md#Lightning": ("lightning",),
    "integrations.md#Hugging Face Trainer": ("transformers",),
    "integrations.md#accelerate": ("accelerate",),
    "integrations.md#LoRA and other adapters": ("peft", "transformers"),
    "split.md": ("grpc",),
    "tutorials/audit.md": ("mlxtend",),
    "tutorials/federated.md": ("mlxtend", "matplotlib"),
    "tutorials/images.md": ("mlxtend",),
    "tutorials/split.md": ("mlxtend",),
    "tutorials/text_lora.md": ("transformers", "peft"),
}

# Pages that run for longer than the default tests have: only in the slow tests.
SLOW_PAGES: Mapping[str, str] = {"tutorials/federated.md": "six federations, half a minute"}

# What a page says that its reader has already.
GIVEN: Mapping[str, str] = {
    "compat_deepee.md": """
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

generator = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(1000, 3, generator=generator), torch.randint(2, (1000,), generator=generator))
net = torch.nn.Linear(3, 2)
""",
    "errors.md": """
class optimizer:
    @staticmethod
    def step():
        raise BudgetExceededError("The budget is spent.")

model, published = "weights", []
publish = published.append
""",
}

# Text that is no code, though it is set like code.
NOT_CODE: dict[tuple[str, str], str] = {
    (
        "accounting.md",
        "delta(eps) = 1 / (2 pi) * integral of e^(K(z) - z eps) / (z (z + 1)) dw,      z = t + iw, any t > 0,",
    ): "a formula",
    ("concepts.md", "P(outcome in S | with)  <=  e^epsilon * P(outcome in S | without) + delta,"): "a formula",
}

# Code that is not run.
NOT_RUN: dict[tuple[str, str], str] = {
    (
        "compat_jax_privacy.md",
        "import jax.numpy as jnp, numpy as np, optax",
    ): "needs jax-privacy",
    (
        "data_parallel.md",
        "for block in model.blocks:",
    ): "needs several processes: tests/distributed/test_sharded.py runs it",
}

Treated = Literal["run", "slow", "parsed", "options", "target", "extras", "synopsis", "elsewhere"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a kind of command is treated where it is not simply run.

    Attributes:
        command: a pattern for the whole command, without its comment.
        how: "slow" runs it in the slow tests, and parses it in the others; "parsed" only parses it; "options" looks
            for its options in the program's text; "target" for its target in the Makefile; "extras" for its extras in
            setup.cfg; "synopsis" asks each command that it names for its help; "elsewhere" leaves it to `by`.
        why: the reason.
        by: the test file that runs it instead.
    """

    command: str
    how: Treated
    why: str
    by: str | None = None


COMMANDS: Sequence[Rule] = (
    Rule(command=r"make [\w-]+", how="target", why="sets up an environment; CI runs it"),
    Rule(command=r"pip install .*", how="extras", why="installs; CI installs the wheel in an empty environment"),
    Rule(command=r"(?:dpdl|python -m accountants) .*(?:\||\.\.\.).*", how="synopsis", why="not a whole command"),
    Rule(command=r"(?:\w+=\S+ )?python -m benchmarks\.\w+.*", how="options", why="takes minutes to hours"),
    Rule(
        command=r"dpdl train --data (?:mnist|photos)/.*",
        how="parsed",
        why="needs files that a reader has, and minutes",
        by="tests/end_to_end/test_train_command.py",
    ),
    Rule(
        command=r"dpdl (?:train|federated) .*--resume.*",
        how="parsed",
        why="goes on with an interrupted run",
        by="tests/end_to_end/test_kills.py",
    ),
    Rule(
        command=r"dpdl report .*",
        how="parsed",
        why="reads the folder of a run",
        by="tests/report/test_command.py",
    ),
    Rule(command=r"dpdl sweep\b.*", how="parsed", why="many training runs", by="tests/tradeoff/test_command.py"),
    Rule(command=r"dpdl audit .*", how="parsed", why="reads a saved run", by="tests/audit/test_command.py"),
    Rule(command=r"dpdl train", how="slow", why="a whole training run"),
    Rule(command=r"dpdl federated .*", how="slow", why="a whole training run"),
    Rule(
        command=r"dpdl split (?:serve|join) .*",
        how="parsed",
        why="two processes that wait for each other",
        by="tests/split/channel/test_commands.py",
    ),
    Rule(
        command=r"torchrun .*",
        how="elsewhere",
        why="several processes",
        by="tests/distributed/test_ranks.py",
    ),
    Rule(
        command=r"flwr .*|flower-\w+ .*|kill \$\(pgrep -f 'flower-.*|cd examples/flower|python -m dpdl_flower\..*",
        how="elsewhere",
        why="processes of Flower, from the example's folder",
        by="tests/federated/flower/test_processes.py",
    ),
)


def treatment(line: str) -> Rule:
    """The first rule for a command; without one it is run."""
    bare = re.sub(r"\s+#.*$", "", line)
    return next(
        (rule for rule in COMMANDS if re.fullmatch(rule.command, bare)),
        Rule(command=re.escape(bare), how="run", why=""),
    )
