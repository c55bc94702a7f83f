from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import REPOSITORY
from jsonschema import Draft202012Validator, ValidationError
from reports import full_report, hostile_report

from lightning_mnp.report import DefenseReport, RunResult
from lightning_mnp.report.report import SCHEMA

PATH = REPOSITORY / "docs" / "reference" / f"report-{SCHEMA}.schema.json"
PUBLISHED = json.loads(PATH.read_text("utf-8"))


def validate(report: DefenseReport) -> None:
    Draft202012Validator(PUBLISHED).validate(json.loads(report.to_json()))


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every description of an object with named parts."""
    if isinstance(schema, dict):
        if "properties" in schema and "type" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)


def test_the_published_schema_is_one() -> None:
    Draft202012Validator.check_schema(PUBLISHED)
    assert PUBLISHED["properties"]["schema"]["const"] == SCHEMA
    for each in objects(PUBLISHED):
        assert each["required"] == list(each["properties"])
        assert each["additionalProperties"] is False


@pytest.mark.parametrize(
    "report",
    [
        full_report(),
        DefenseReport("clean"),
        DefenseReport("undecided", judged=False, runs=[RunResult(float("nan"), 0, (1,), 0, 0, "")]),
    ],
)
def test_reports_are_of_the_published_schema(report: DefenseReport) -> None:
    validate(report)


def test_a_field_that_is_new_or_missing_is_noticed() -> None:
    content = full_report().to_dict()
    for changed in ({**content, "new": 1}, {k: v for k, v in content.items() if k != "runs"}):
        with pytest.raises(ValidationError):
            Draft202012Validator(PUBLISHED).validate(changed)
    with pytest.raises(ValidationError):  # a picture that is none
        validate(hostile_report())
