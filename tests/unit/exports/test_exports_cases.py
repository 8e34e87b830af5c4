"""The lists of `make e2e-exports` and `bench.served`: what they ask for is asked rightly, and a table keeps its other rows."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from bench import served
from exports.cases import CASES, Case
from exports.report import BEGIN, END, Result, write_table
from perch.api import Spec
from perch.builders.jobs import build_export_request
from perch.names import artifact_revision
from perch.observed import Identity, Installation


def put(name: str, content: bytes) -> dict[str, str]:
    return {"uri": f"s3://checkpoints/{name}", "sha256": "a" * 64}


def entry(case: Case) -> dict[str, Any]:
    content = case.entry(put)
    content["checkpoint"] |= put("checkpoint", b"")
    if case.precision == "INT8":
        content["conversion"]["calibration"] = put("calibration.npz", b"")
    return content


SERVED = [served.case_of(network, precision) for network in served.NETWORKS for precision in served.PRECISIONS]


@pytest.mark.parametrize("case", [*CASES, *SERVED], ids=lambda case: case.name)
def test_every_case_is_a_version_that_the_exporter_takes(case: Case) -> None:
    spec = Spec.model_validate(
        {
            "repository": {"uri": "s3://models/x", "credentialsSecretRef": {"name": "s3"}},
            "versions": [entry(case)],
            "traffic": {"stable": 1},
            "routing": {"parentRefs": [{"name": "gateway"}], "hostnames": ["x.example.com"]},
        }
    )
    version = spec.versions[0]
    installation = Installation(cluster="test", exporter_image="", artifacts_image="", triton_image="")
    request = build_export_request(Identity("ns", case.slug, "", 0, ""), spec, version, artifact_revision(version), installation)
    assert [output.name for output in request.outputs] == [output["name"] for output in case.outputs]


def test_names_are_unique_and_become_names_of_kubernetes() -> None:
    slugs = {case.slug for case in CASES}
    assert len(slugs) == len(CASES)
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", slug) for slug in slugs), slugs


def test_a_later_run_of_some_cases_leaves_the_others_rows(tmp_path: Path) -> None:
    document = tmp_path / "exports.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    first, second, third = CASES[:3]
    results = [Result(first, 1.0, 2.0, 3.0, 4.0, "1e-06"), Result(third, failed="one | two")]
    write_table(results, date(2026, 1, 1), document)
    write_table([Result(second, 5.0, apart="same names")], date(2026, 1, 2), document)
    text = document.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == [case.name for case in (first, second, third)]
    assert rows[0].endswith("| 2.0 | 3.0 | 4 | 1e-06 | 2026-01-01 |")
    assert "same names" in rows[1]
    assert r"FAILED: one \| two" in rows[2]
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
