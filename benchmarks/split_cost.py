"""Bytes and client arithmetic of split, federated and large-batch training, beside the published tables.

    python -m benchmarks.split_cost                          # prints; nothing is trained
    python -m benchmarks.split_cost --out split_cost.json --plot split_cost.svg

Published [1]: client TFLOPs of VGG on CIFAR-10, client GB of ResNet-50 on CIFAR-100, with 100 and 500 clients. How long
was trained, where the network was cut, which variant of it was used and how large batches were is not stated with the
tables. So each scheme has one unknown that is fitted to the figure for 100 clients, and the figure for 500 is then a
prediction. What the fit needs to be is printed: it shows which settings can be behind the table.

References:
    [1] Vepakomma et al., Split learning for health, 2018. arXiv:1812.00564, the two tables on resources of a client.
    [2] Singh et al., Detailed comparison of communication efficiency of split learning and federated learning, 2019.
        arXiv:1909.09145.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import environment
from benchmarks.split_cost_networks import resnet50, vgg16
from dpdl.split.cost import Workload, compare
from dpdl.split.cost_report import shown
from dpdl.split.network_cost import NetworkCost, measure_network

RECORDS = 50_000  # training images of CIFAR-10 and CIFAR-100
CLIENTS = (100, 500)
PUBLISHED_TFLOPS = {"large batch": (29.4, 5.89), "federated": (29.4, 5.89), "split": (0.1548, 0.03)}
PUBLISHED_GB = {"large batch": (13.0, 14.0), "federated": (3.0, 2.4), "split": (6.0, 1.2)}
EPOCHS = 30.0  # of the table that is ours
BATCH = 128
EXAMPLE = torch.zeros(1, 3, 32, 32)
TERA, GIGA = 1e12, 1e9

ASSUMED = (
    "50,000 records in equal shares; float32; labels shared; peer-to-peer synchronisation once an epoch",
    "activations and their gradients are both counted; [2] counts one crossing of the cut",
    "two FLOPs for a multiplication and an addition; convolutions and matrix products only",
    "fitted, each to 100 clients: epochs of the TFLOPs (to federated); epochs, rounds and steps of the GB",
    "'three forward passes' takes a backward pass for twice a forward one at every layer; counted, the client's first "
    "layer costs less, since nobody needs the gradient of its input",
    "batch normalisation in ResNet-50, as published; with dpdl it would be group normalisation, of as many weights",
)
NOT_REPRODUCED = (
    "absolute TFLOPs: the number of epochs is not stated; what is reproduced are ratios of schemes and of clients",
    "federated GB fall from 3 to 2.4 between 100 and 500 clients: with all weights both ways in each round the formula "
    "has no number of clients in it, so fewer rounds must have been run, or not all clients took part in each",
    "large-batch GB rise from 13 to 14: likewise, another number of steps",
    "which cut and which stem were behind 6 and 1.2 GB: cuts and epochs can be traded for one another",
    "accuracies beside the costs: nothing is trained here",
)


def networks() -> dict[str, tuple[nn.Sequential, int]]:
    """Name to network and number of layers at the client."""
    return {
        "VGG-16, hidden 4096, cut after 1 convolution": (vgg16(classes=10), 1),
        "VGG-16, hidden 4096, cut after 2 convolutions": (vgg16(classes=10), 2),
        "VGG-16, one linear layer, cut after 1 convolution": (vgg16(classes=10, hidden=None), 1),
        "ResNet-50, stem 3x3, cut after the stem": (resnet50(classes=100, stem="3x3"), 1),
        "ResNet-50, stem 7x7, cut after the stem": (resnet50(classes=100, stem="7x7"), 1),
        "ResNet-50, stem 7x7, cut after the stem's pooling": (resnet50(classes=100, stem="7x7"), 2),
        "ResNet-50, stem 7x7, cut after stage 1": (resnet50(classes=100, stem="7x7"), 5),
    }


def measured(model: nn.Sequential, cut: int) -> NetworkCost:
    """The network cut after so many layers."""
    return measure_network([model[:cut], model[cut:]], parties=["client", "server"], example=EXAMPLE)


def forward_ratio(model: nn.Sequential, cut: int) -> float:
    """Arithmetic of a forward pass, the whole network's over the client's."""
    counts = []
    for layers in (model, model[:cut]):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            layers.eval()(EXAMPLE)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


def tflops(network: NetworkCost, *, ratio: float) -> dict[str, Any]:
    """The first table, with epochs fitted to federated learning with 100 clients.

    Args:
        network: as counted.
        ratio: of a forward pass, the whole network's arithmetic over the client's.
    """
    target = PUBLISHED_TFLOPS["federated"][0] * TERA
    epochs = target * CLIENTS[0] / (RECORDS * network.flops())
    rows: dict[str, list[float]] = {name: [] for name in PUBLISHED_TFLOPS}
    for clients in CLIENTS:
        report = compare(network, Workload(clients=clients, records=RECORDS, epochs=epochs, batch_size=BATCH))
        for name, row in rows.items():
            row.append(report.scheme(name).client_flops / TERA)
    taken = [figure / ratio for figure in rows["federated"]]
    return {"epochs_fitted": epochs, "tflops": rows | {"split, three forward passes": taken}}


def gigabytes(network: NetworkCost) -> dict[str, Any]:
    """The second table: what each scheme's unknown has to be for 100 clients, and what follows for 500."""
    one = compare(network, Workload(clients=CLIENTS[0], records=RECORDS, epochs=1.0, batch_size=BATCH))
    found: dict[str, Any] = {}
    unknowns = {"split": ("epochs", 1.0), "federated": ("rounds", 1.0), "large batch": ("steps", RECORDS / BATCH)}
    for name, (unknown, per_epoch) in unknowns.items():
        times = PUBLISHED_GB[name][0] * GIGA / one.scheme(name).client_bytes
        row = []
        for clients in CLIENTS:
            report = compare(network, Workload(clients=clients, records=RECORDS, epochs=times, batch_size=BATCH))
            row.append(report.scheme(name).client_bytes / GIGA)
        found[name] = {"unknown": unknown, "fitted": times * per_epoch, "gigabytes": row}
    return found


def ours(network: NetworkCost) -> dict[str, Any]:
    """What the calculator says with settings of our own, all of them stated."""
    return {
        str(clients): compare(
            network, Workload(clients=clients, records=RECORDS, epochs=EPOCHS, batch_size=BATCH)
        ).to_dict()
        for clients in CLIENTS
    }


def measure() -> dict[str, Any]:
    """All tables."""
    record: dict[str, Any] = {"published_tflops": PUBLISHED_TFLOPS, "published_gigabytes": PUBLISHED_GB, "networks": {}}
    for name, (model, cut) in networks().items():
        network, ratio = measured(model, cut), forward_ratio(model, cut)
        record["networks"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "cut": list(network.pieces[0].shape),
            "gflops_a_record": network.flops() / GIGA,
            "flops_ratio": network.flops() / network.flops("client"),
            "flops_ratio_forward_only": ratio,
            "first_table": tflops(network, ratio=ratio),
            "second_table": gigabytes(network),
            "ours": ours(network),
        }
    record["assumed"] = list(ASSUMED)
    record["not_reproduced"] = list(NOT_REPRODUCED)
    return record


def text(record: dict[str, Any]) -> str:
    """The tables, to be read."""
    whole, part = PUBLISHED_TFLOPS["federated"][0], PUBLISHED_TFLOPS["split"][0]
    lines = [f"client TFLOPs, 100 / 500 clients; published ratio of federated to split: {whole / part:.0f}"]
    for name, row in PUBLISHED_TFLOPS.items():
        lines.append(f"  {'published, ' + name:<64}{row[0]:>9.4g} /{row[1]:>7.4g}")
    for name, found in record["networks"].items():
        if name.startswith("VGG"):
            first = found["first_table"]
            lines.append(
                f"  {name}: {first['epochs_fitted']:.1f} epochs fitted, ratio {found['flops_ratio']:.1f} "
                f"(forward only {found['flops_ratio_forward_only']:.1f})"
            )
            lines += [f"    {n:<62}{r[0]:>9.4g} /{r[1]:>7.4g}" for n, r in first["tflops"].items()]
    lines.append("client GB, 100 / 500 clients")
    lines += [f"  {'published, ' + name:<64}{row[0]:>9.4g} /{row[1]:>7.4g}" for name, row in PUBLISHED_GB.items()]
    for name, found in record["networks"].items():
        if name.startswith("ResNet"):
            lines.append(f"  {name}: {found['cut']}")
            for scheme, row in found["second_table"].items():
                said = f"{scheme}, {row['fitted']:.1f} {row['unknown']} fitted"
                lines.append(f"    {said:<62}{row['gigabytes'][0]:>9.4g} /{row['gigabytes'][1]:>7.4g}")
    lines.append(
        f"with {EPOCHS:g} epochs, {BATCH} records a step, one round an epoch: a client's bytes, 100 / 500 clients"
    )
    for name, found in record["networks"].items():
        at = found["ours"]
        crossing = at["100"]["break_even_clients"]
        sizes = {n: [shown(at[str(k)]["schemes"][n]["client_bytes"], "B") for k in CLIENTS] for n in PUBLISHED_GB}
        lines.append(f"  {name}: " + "; ".join(f"{n} {' / '.join(row)}" for n, row in sizes.items()))
        lines.append(f"    split moves fewer in all from {crossing['federated']:,} clients on than federated learning")
    lines += ["assumed:", *(f"  - {line}" for line in record["assumed"])]
    return "\n".join([*lines, "not reproduced:", *(f"  - {line}" for line in record["not_reproduced"])])


def main() -> None:
    """Count, print, and write only where asked to."""
    parser = argparse.ArgumentParser(description="Cost of split learning beside the published tables.")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = measure()
    print(text(record))
    if options.out is not None:
        options.out.write_text(json.dumps({**environment(("dpdl", "torch")), **record}, indent=2) + "\n")
    if options.plot is not None:
        from benchmarks.split_cost_chart import draw_chart

        draw_chart(record, options.plot)


if __name__ == "__main__":
    main()
