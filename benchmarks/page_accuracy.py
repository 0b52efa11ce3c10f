"""What the results of accounting, accuracy, federated and split learning, and audits read like on the page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accounting_report import OURS, TOLERANCE
from benchmarks.mnist_accuracy import PUBLISHED_ACCURACY
from benchmarks.page_table import NONE, number, percent, short, table
from dpdl.privacy_report import rounded_down, rounded_up

__all__ = ["accounting", "audit", "audits_of", "federated", "mnist", "refuted", "split"]

Record = Mapping[str, Any]

FEDERATED_CLAIMS = (
    ("server", "record"),
    ("model consumers", "record"),
    ("server", "client"),
    ("model consumers", "client"),
)


# ── accounting ──────────────────────────────────────────────────────────────────────────────────────


def accounting(record: Record) -> str:
    """By engine over all rows; times of the questions; our misses and those of others."""
    head = ["engine", "answered", "refused", "failed", "too slow", "unsound", "median looseness", "worst", "median, ms"]
    lines = [[name, *_summary(row)] for name, row in record["summary"].items()]
    names = list(record["summary"])
    questions = [[case, *(_time(answers.get(name)) for name in names)] for case, answers in record["cases"].items()]
    ours = record["summary"][OURS]
    worst = max(ours["worst_looseness"], ours["worst_lower_looseness"] or 0.0)
    held = worst <= TOLERANCE and not any(ours[key] for key in ("unsupported", "failed", "timeout", "unsound"))
    verdict = "is held" if held else "is NOT held"
    faster = [
        f"{case} ({name} {_time(answer)}, looser by {answer['upper'] / answers[OURS]['upper'] - 1:.1%})"
        for case, answers in record["cases"].items()
        for name, answer in answers.items()
        if name != OURS and answer["status"] == "ok" and answer["cpu_s"] < answers[OURS]["cpu_s"]
    ]
    unsound = [f"{name} {row['unsound']}" for name, row in record["summary"].items() if row["unsound"]]
    return "\n".join(
        [
            table(head, lines),
            "Processor seconds from empty caches:\n",
            table(["question", *names], questions),
            "**What falls short.**\n",
            f"- The target for {OURS}, every row answered, sound, and within {TOLERANCE:g} of the truth on both sides, "
            f"{verdict}; its worst is {short(worst)}.",
            f"- Faster than {OURS}, at the price of a looser answer: {'; '.join(faster)}."
            if faster
            else "- Time: nothing.",
            f"- Unsound answers of others: {', '.join(unsound)}." if unsound else "- No library was unsound.",
            "",
        ]
    )


def _summary(row: Record) -> Sequence[str]:
    refused = sum(row[status] for status in ("unsupported", "failed", "timeout"))
    return (
        f"{row['rows'] - refused} of {row['rows']}",
        *(str(row[key]) for key in ("unsupported", "failed", "timeout", "unsound")),
        short(row["median_looseness"]),
        short(row["worst_looseness"]),
        number(1000 * row["median_cpu_s"], 1),
    )


def _time(answer: Record | None) -> str:
    if answer is None:
        return NONE
    if answer["status"] != "ok":
        return str(answer["text"] if answer["status"] == "timeout" else answer["status"])
    return f"{short(answer['cpu_s'])} s"


# ── accuracy ────────────────────────────────────────────────────────────────────────────────────────


def mnist(record: Record) -> str:
    """The claim and the accuracy, beside the published figure."""
    reached, training = record["training"]["test_accuracy"], record["training"]
    line = [percent(reached), percent(PUBLISHED_ACCURACY), rounded_up(record["epsilon"]), f"{training['seconds']:.0f}"]
    gap = PUBLISHED_ACCURACY - reached
    below = (
        f"{100 * gap:.2f} points below the published figure" if gap > 0 else "Nothing: the published figure is reached"
    )
    shown = table(["", "test accuracy", "published", "epsilon <=", "seconds"], [["MNIST, 40 epochs", *line]])
    return f"> {record['claim']}\n\n{shown}\n**What falls short.** {below}, at a smaller epsilon (theirs: 3). One run\n"


def federated(record: Record) -> str:
    """Accuracy and epsilons by scheme, and the time of a round beside pfl."""
    lines = [[name, *_federated(row["runs"])] for name, row in record["accuracy"].items()]
    head = ["scheme", "test accuracy, each run", *(f"a {unit}, against {who}" for who, unit in FEDERATED_CLAIMS)]
    parts = [table(head, lines), "Epsilons at delta = 1e-5, the largest of all clients and runs.\n"]
    for row in _timed(record).values():
        task = row["task"]
        seconds = [[who, number(took["cpu"])] for who, took in row["seconds_a_round"].items()]
        what = f"{task['clients']} clients, {task['model']}, {task['steps']} local steps of {task['batch_size']}"
        parts += [f"Processor seconds a round, {what}:\n", table(["scheme", "seconds"], seconds)]
    made = record["speed"].get("environment", {})
    if made:
        parts.append(f"The times were measured on {made['date']}, {made.get('remark', 'on the same machine')}.\n")
    parts += ["**What falls short.**\n", *(f"- {line}" for line in _federated_short(record)), ""]
    return "\n".join(parts)


def _timed(record: Record) -> Mapping[str, Record]:
    """The tasks of the speed table; what else stands beside them says how they were measured."""
    speed = record["speed"]
    return {name: row for name, row in speed.items() if isinstance(row, Mapping) and "seconds_a_round" in row}


def _federated(runs: Sequence[Record]) -> Sequence[str]:
    return (", ".join(percent(run["accuracy"]) for run in runs), *(_claimed(runs, *case) for case in FEDERATED_CLAIMS))


def _claimed(runs: Sequence[Record], who: str, unit: str) -> str:
    """The largest of the runs' epsilons for this adversary and unit, as their claims state it."""
    start = f"against {who}, {unit}: "
    claims = [claim.removeprefix(start) for run in runs for claim in run["claims"] if claim.startswith(start)]
    found = [re.match(r"epsilon <= ([\d.]+)", claim) for claim in claims]
    if len(claims) != len(runs) or not all(found):
        return "no bound"
    return f"<= {max((match[1] for match in found if match), key=float)}"


def _federated_short(record: Record) -> list[str]:
    best = {name: statistics.mean(run["accuracy"] for run in row["runs"]) for name, row in record["accuracy"].items()}
    useless = [name for name, accuracy in best.items() if accuracy < 0.3]
    lines = [f"Learns next to nothing (below 30 %): {', '.join(useless)}."] if useless else []
    for name, row in _timed(record).items():
        took = {who: figures["cpu"] for who, figures in row["seconds_a_round"].items()}
        for scheme in ("none", "client"):
            ours, theirs = took.get(f"dpdl {scheme}"), took.get(f"pfl {scheme}")
            if ours and theirs and ours > theirs:
                lines.append(f"{name}, scheme `{scheme}`: {ours / theirs:.2f} times the processor time of pfl.")
    return lines


def split(record: Record) -> str:
    """Accuracy, epsilon against the server and of the weights, and the decoder's success."""
    lines = []
    for name, row in record["runs"].items():
        server, weights = (_split_epsilon(row["claims"], who) for who in ("server", "model consumers"))
        recovered = row.get("decoder_recovered_variance")
        lines.append(
            [name, percent(row["accuracy"]), weights, server, percent(None if recovered is None else max(recovered, 0))]
        )
    head = ["run", "test accuracy", "epsilon of the weights", "epsilon against the server", "decoder recovers"]
    open_ = [line[0] for line in lines if line[3] == "no bound"]
    return (
        f"{table(head, lines)}\n**What falls short.** {len(open_)} of {len(lines)} runs have no bound against the "
        "server: clipping the parts protects what is trained, not what is sent. Where there is one, and the decoder is "
        "held off, accuracy is paid for it.\n"
    )


def _split_epsilon(claims: Sequence[Record], who: str) -> str:
    claim = next((c for c in claims if c["against"] == who and c["unit"] == "record"), None)
    if claim is None:
        return "nothing private"
    return "no bound" if claim["epsilon"] is None else f"<= {rounded_up(claim['epsilon'])}"


# ── audit ───────────────────────────────────────────────────────────────────────────────────────────


def audit(record: Record) -> str:
    """Lower bounds beside claims; faults that were not found, and correct runs whose claim was refuted."""
    lines, missed, wronged = [], [], []
    for row in record["rows"]:
        name, audits = f"{row['model']}, {row['plan']}, {row['training']}", len(audits_of(row))
        found = rounded_down(float(row["epsilon_lower"]))
        lines.append([name, f"<= {rounded_up(row['claimed_epsilon'])}", f">= {found}", f"{refuted(row)} of {audits}"])
        correct = row["training"].startswith("correct")
        if not correct and refuted(row) < audits:
            missed.append(f"{name} ({audits - refuted(row)} of {audits})")
        if correct and refuted(row):
            wronged.append(f"{name} ({refuted(row)} of {audits})")
    return "\n".join(
        [
            f"Medians of lower bounds, each at confidence {record['settings']['confidence']:g}.\n",
            table(["network, plan, training", "claimed", "at least", "claim refuted"], lines),
            "**What falls short.**\n",
            f"- Audits that missed a fault: {'; '.join(missed)}."
            if missed
            else "- Every audit found its planted fault.",
            f"- Correct runs whose claim was refuted: {'; '.join(wronged)}."
            if wronged
            else "- No correct run was blamed.",
            "",
        ]
    )


def audits_of(row: Record) -> Sequence[Record]:
    """The audits behind a row; a row that is one audit is that audit."""
    audits: Sequence[Record] = row.get("audits", [row])
    return audits


def refuted(row: Record) -> int:
    """How many of them contradict the claim."""
    return sum(not audit["consistent"] for audit in audits_of(row))
