"""`dpdl split cost`: bytes and arithmetic of split, federated and large-batch training, before anybody trains."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any, get_args

import torch
from torch import nn

from accountants.commands.plot_option import add_plot, refuse_what_cannot_be_drawn
from dpdl.errors import ModelError, ParameterError
from dpdl.models import MODEL_NAMES, build_model
from dpdl.split.cost import DTYPES, Labels, Workload, compare
from dpdl.split.network_cost import NetworkCost, Side, measure_network
from dpdl.split.weight_sync import Sync

__all__ = ["register"]

EXAMPLES = """examples:
  dpdl split cost --clients 100 --records 60000 --epochs 10
  dpdl split cost --model cifar-cnn --shape 3,32,32 --cut 4 --clients 500 --records 50000 --epochs 30 --plot cost.svg
  dpdl split cost --labels stay --head 1 --clients 20      a U-shape: the last layer is the client's, too
  dpdl split cost --model hospital.networks:densenet --shape 1,224,224 --cut 2 --json
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "cost",
        help="what split, federated and large-batch training would cost",
        description="Bytes on the network and arithmetic at the clients, of three ways to train one network on the "
        "same records, the number of clients from which split learning moves less, and all that was assumed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [name for name in MODEL_NAMES if name != "auto"]
    add("--model", default="papernot-cnn", metavar="NAME", help=f"{', '.join(names)}, or package.module:function of "
        "your own, which returns an nn.Sequential and is run (default: %(default)s)")  # fmt: skip
    add("--shape", default="1,28,28", metavar="C,H,W", help="of one record (default: %(default)s)")
    add("--classes", type=int, default=10, help="of a named model (default: %(default)s)")
    add("--cut", type=int, metavar="N", help="the model's first N layers are the client's (default: up to the first "
        "linear layer)")  # fmt: skip
    add("--head", type=int, default=0, metavar="N", help="so are its last N, with --labels stay")
    add("--clients", type=int, default=10, metavar="N", help="(default: %(default)s)")
    add("--records", type=int, default=60_000, metavar="N", help="of all clients together (default: %(default)s)")
    add("--epochs", type=float, default=10.0, help="(default: %(default)s)")
    add("--rounds", type=float, help="averages of federated learning (default: one for each epoch)")
    add("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    add("--sync", choices=get_args(Sync), default="peer_to_peer", help="how the client's weights get from client to "
        "client (default: %(default)s)")  # fmt: skip
    add("--labels", choices=get_args(Labels), default="shared", help="whose labels are (default: %(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="on the way (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    add_plot(parser, "bytes over clients")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    refuse_what_cannot_be_drawn(arguments.plot)
    workload = Workload(
        clients=arguments.clients,
        records=arguments.records,
        epochs=arguments.epochs,
        rounds=arguments.rounds,
        batch_size=arguments.batch_size,
        sync=arguments.sync,
        labels=arguments.labels,
        dtype=arguments.dtype,
    )
    shape = _shape(arguments.shape)
    model = _model(arguments.model, shape, arguments.classes)
    cut = _default_cut(model) if arguments.cut is None else arguments.cut
    network = _measured(model, shape, cut=cut, head=arguments.head)
    report = compare(network, workload)
    if arguments.plot is not None:
        from dpdl.split.cost_plot import plot_cost  # matplotlib is of the extra "plots"

        plot_cost(network, workload, arguments.plot, title=f"{arguments.model}, cut after layer {cut}")
    sys.stdout.write(f"{report.to_json() if arguments.json else report}\n")
    return 0


def _measured(model: nn.Sequential, shape: tuple[int, ...], *, cut: int, head: int) -> NetworkCost:
    layers = len(model)
    if not 0 < cut < layers - head or head < 0:
        raise ParameterError(
            f"--cut must leave layers on both sides, and --head some in between: got --cut {cut} and --head {head} of "
            f"{layers} layers."
        )
    stretches: list[nn.Module] = [model[:cut], model[cut : layers - head]]
    parties: list[Side] = ["client", "server"]
    if head:
        stretches.append(model[layers - head :])
        parties.append("client")
    return measure_network(stretches, parties=parties, example=torch.zeros(1, *shape))


def _default_cut(model: nn.Sequential) -> int:
    """Before the first linear layer that is not the first layer with weights; or after the first layer."""
    weighted = [n for n, layer in enumerate(model) if any(True for _ in layer.parameters())]
    return next((n for n in weighted[1:] if isinstance(model[n], nn.Linear)), 1)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(length) for length in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ParameterError(f"--shape must be whole numbers >= 1 with commas, such as 1,28,28; got {text!r}.")
    return shape


def _model(name: str, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    if ":" in name:
        model = _own_model(name)
    else:
        if len(shape) != 3:
            raise ParameterError(f"--shape of the named models is C,H,W, got {','.join(map(str, shape))}.")
        model = build_model(name, in_channels=shape[0], image_size=(shape[1], shape[2]), classes=classes)
    if not isinstance(model, nn.Sequential):
        raise ModelError(f"{name} is a {type(model).__name__}: what is cut by counting layers is an nn.Sequential.")
    return model


def _own_model(name: str) -> object:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ParameterError(f"--model {name!r} cannot be imported: {error}. Give package.module:function.") from error
    if not callable(made):
        raise ParameterError(f"--model {name!r} is a {type(made).__name__}; give a function that makes a network.")
    model: object = made()
    return model
