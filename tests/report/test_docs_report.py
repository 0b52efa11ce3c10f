"""The guide to reports explains what a page can say."""

from __future__ import annotations

from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "report.md"


def test_every_alarm_of_the_page_is_explained() -> None:
    text = GUIDE.read_text()
    for alarm in ("NO GUARANTEE", "INSECURE SEED", "above the claim is an alarm", "protects\nlittle"):
        assert alarm in text
