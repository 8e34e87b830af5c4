"""Waiting for Ready, with a kubectl that prints what the test says."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo.watch import NotReady, condition, export_log, wait_published, wait_ready

Object = dict[str, Any]


def model(generation: int, *conditions: tuple[str, str, str, int], versions: list[Object] | None = None) -> Object:
    told = [
        {"type": kind, "status": status, "reason": reason, "message": "so it is", "observedGeneration": seen}
        for kind, status, reason, seen in conditions
    ]
    return {"metadata": {"generation": generation}, "status": {"conditions": told, "versions": versions or []}}


def tenant(folder: Path, *seen: Object, then: str = "") -> Any:
    """One whose kubectl prints these objects, and then does what the shell words say."""
    lines = "".join(f"echo {shlex.quote(json.dumps(each))}\n" for each in seen)
    (folder / "kubectl").write_text(f"#!/bin/sh\n{lines}{then}\n")
    (folder / "kubectl").chmod(0o755)
    return SimpleNamespace(namespace="vision", cluster=SimpleNamespace(env=lambda: {"PATH": f"{folder}:/usr/bin:/bin"}))


def test_ready_counts_only_for_the_newest_generation(tmp_path: Path) -> None:
    old = model(2, ("Ready", "True", "Serving", 1))
    busy = model(2, ("Ready", "False", "Starting", 2))
    done = model(2, ("Ready", "True", "SplitHeld", 2))
    told: list[str] = []
    found = wait_ready(tenant(tmp_path, old, busy, busy, done, then="exec sleep 60"), "digits", told.append, 20)
    assert condition(found, "Ready")["reason"] == "SplitHeld"
    words = [line.split(" s  ", 1)[1] for line in told]
    assert words == ["(the operator has not seen this generation yet)", "Starting: so it is", "SplitHeld: so it is"]


def test_a_stall_ends_the_wait_with_its_message(tmp_path: Path) -> None:
    stalled = model(1, ("Ready", "False", "ExportFailed", 1), ("Stalled", "True", "ExportFailed", 1))
    with pytest.raises(NotReady, match="digits stalled: ExportFailed: so it is"):
        wait_ready(tenant(tmp_path, stalled, then="exec sleep 60"), "digits", lambda _: None, 20)


def test_a_stall_of_an_older_generation_does_not(tmp_path: Path) -> None:
    before = model(2, ("Ready", "False", "ExportFailed", 1), ("Stalled", "True", "ExportFailed", 1))
    done = model(2, ("Ready", "True", "Serving", 2))
    wait_ready(tenant(tmp_path, before, done, then="exec sleep 60"), "digits", lambda _: None, 20)


def test_the_deadline_ends_the_wait_with_what_was_said_last(tmp_path: Path) -> None:
    busy = model(1, ("Ready", "False", "Exporting", 1))
    with pytest.raises(NotReady, match=r"not Ready within 0 s.*Exporting: so it is"):
        wait_ready(tenant(tmp_path, busy, then="exec sleep 60"), "digits", lambda _: None, 0.4)


def test_published_means_every_version(tmp_path: Path) -> None:
    one = {"version": 1, "phase": "Serving", "artifactDigest": "sha256:1"}
    busy, done = {"version": 2, "phase": "Exporting"}, {"version": 2, "phase": "Published", "artifactDigest": "sha256:2"}
    seen = [model(1, versions=[one, busy]), model(1, versions=[one, done])]
    assert wait_published(tenant(tmp_path, *seen, then="exec sleep 60"), "digits", 20) == [one, done]


def test_a_failed_export_is_told_in_its_own_words(tmp_path: Path) -> None:
    failed = {"version": 2, "phase": "Failed", "message": "fetch: no such object"}
    with pytest.raises(NotReady, match="version 2 was not exported: fetch: no such object"):
        wait_published(tenant(tmp_path, model(1, versions=[failed]), then="exec sleep 60"), "digits", 20)


def test_the_export_log_goes_by_the_containers_order_and_leaves_out_what_is_not_for_people() -> None:
    printed = [
        "[pod/digits-v1-1-x/publish] 10:00 published",
        '[pod/digits-v1-1-x/publish] {"outcome":"Published"}',
        "error: container is waiting to start",
        "[pod/digits-v1-1-x/fetch] 09:58 start",
        "[pod/digits-v1-1-x/convert] 09:59 start",
    ]
    fake: Any = SimpleNamespace(kubectl=lambda *_, **__: "\n".join(printed))
    assert export_log(fake, "") == ["fetch: 09:58 start", "convert: 09:59 start", "publish: 10:00 published"]
