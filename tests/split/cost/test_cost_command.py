"""`dpdl split cost`: from settings to figures, as text, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from accountants.commands.one_line_parser import OneLineParser
from dpdl.errors import DataError, ModelError, ParameterError
from dpdl.models import build_model
from dpdl.split.commands import cost_command
from dpdl.split.cost import Workload, compare
from dpdl.split.network_cost import measure_network

MODULE = "own_networks_of_the_test"


def parsed(*words: str) -> argparse.Namespace:
    parser = OneLineParser(prog="dpdl")
    cost_command.register(parser.add_subparsers(required=True))
    return parser.parse_args(["cost", *words])


def cost(*words: str) -> int:
    arguments = parsed(*words)
    code: int = arguments.run(arguments)
    return code


def test_the_figures_are_those_of_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost("--clients", "30", "--records", "5000", "--epochs", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    model = build_model("papernot-cnn", in_channels=1, image_size=28, classes=10)
    assert isinstance(model, nn.Sequential)
    network = measure_network([model[:7], model[7:]], parties=["client", "server"], example=torch.zeros(1, 1, 28, 28))
    assert told == compare(network, Workload(clients=30, records=5000, epochs=2.0)).to_dict()


def test_a_u_shape_leaves_labels_and_the_last_layers_with_the_client(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost("--labels", "stay", "--head", "1", "--cut", "3") == 0
    assert "the cut is crossed twice" in capsys.readouterr().out


def test_a_network_of_ones_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)(MODULE)
    module.tall = lambda: nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))  # type: ignore[attr-defined]
    module.bent = lambda: nn.Linear(12, 5)  # type: ignore[attr-defined]
    module.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert cost("--model", f"{MODULE}:tall", "--shape", "12", "--cut", "2") == 0
    assert "5 numbers a row" in capsys.readouterr().out
    with pytest.raises(ModelError, match="is a Linear"):
        cost("--model", f"{MODULE}:bent", "--shape", "12")
    with pytest.raises(ParameterError, match="is a int"):
        cost("--model", f"{MODULE}:number", "--shape", "12")
    for missing in (f"{MODULE}:none", "no_such_module_here:f"):
        with pytest.raises(ParameterError, match="cannot be imported"):
            cost("--model", missing)


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'dpdl[plots]'")
    assert cost("--plot", str(tmp_path / "cost.png"), "--clients", "5") == 0
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ParameterError, match="cannot be written"):
        cost("--plot", str(tmp_path / "missing" / "cost.png"))


def test_a_picture_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"dpdl\[plots\]"):
        cost("--plot", str(tmp_path / "cost.png"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cut", "0"], "--cut must leave layers"),
        (["--cut", "10"], "--cut must leave layers"),
        (["--cut", "5", "--head", "5"], "--cut must leave layers"),
        (["--shape", "1,x"], "--shape must be whole numbers"),
        (["--shape", "784"], "C,H,W"),
        (["--clients", "0"], "clients must be"),
        (["--labels", "stay"], "Labels stay exactly where"),
        (["--head", "1"], "Labels stay exactly where"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        cost(*words)
