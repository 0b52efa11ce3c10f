"""The tutorial's commands are settings of a federation."""

from __future__ import annotations

import re
from pathlib import Path

from accountants.commands.one_line_parser import OneLineParser
from dpdl.federated.command import register, settings_given
from dpdl.federated.image_federation import FederationSettings

TUTORIAL = Path(__file__).parents[3] / "docs" / "tutorials" / "federated.md"


def test_the_commands_that_it_shows_are_understood() -> None:
    commands = re.findall(r"^    dpdl (federated [^#\n]*)", TUTORIAL.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        parser = OneLineParser(prog="dpdl")
        register(parser.add_subparsers())
        FederationSettings(**settings_given(parser.parse_args(command.split())))
