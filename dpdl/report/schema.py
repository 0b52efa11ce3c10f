"""The JSON Schema of `PrivacyReport.to_json`, which ships with the package.

    jsonschema.validate(json.loads(text), report_schema())

Whoever reads reports without this library can hold them against it; `PrivacyReport.from_json` checks more than a schema
can say.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

__all__ = ["SCHEMA_FILE", "report_schema"]

# The JSON Schema of what PrivacyReport.to_json writes, in this package.
SCHEMA_FILE = "report-2.schema.json"


def report_schema() -> dict[str, Any]:
    """The schema, draft 2020-12, as plain values."""
    found: dict[str, Any] = json.loads(resources.files("dpdl.report").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))
    return found
