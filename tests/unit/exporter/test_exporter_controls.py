"""The checks of fetch and publish, each with its control: the same forgery with that check taken away, in which it succeeds.

A check whose removal changes nothing protects from nothing. Those of convert and prove are in test_exporter_controls_convert.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import REVISION, file_request, golden, hand_over, request

from perch_exporter import contract, samples, triton_config
from perch_exporter import fetch as fetch_step
from perch_exporter import publish as publish_step
from perch_exporter.contract import Reason
from perch_exporter.failure import StepFailed
from perch_exporter.samples import Golden, save_golden
from perch_exporter.triton_config import build_config, parse_config
from perch_exporter.workspace import FIGURES, GOLDEN, MODEL, Workspace

SECRET = b"AWS_SECRET_ACCESS_KEY=abc"


class Place:
    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.request = file_request(root, b"a checkpoint")
        self.workspace = Workspace(root / "work")
        self.prefix = root / "repository" / "vision" / "digits" / f"1-{REVISION}"
        hand_over(self.workspace)
        self.secret = root / "secret"
        self.secret.write_bytes(SECRET)
        self.ran = root / "ran"

    @property
    def model(self) -> Path:
        return self.workspace.output / MODEL

    def publish(self) -> None:
        publish_step.publish(self.request, self.workspace, {})

    def manifest(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.prefix / "manifest.json").read_bytes())
        return content


def nothing(*_: object) -> None:
    """In the place of a check."""


def no_inspection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish_step, "inspect", nothing)


def no_second_judgement(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish_step, "_judge_again", nothing)


def no_comparison_with_the_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish_step, "inspect_golden", nothing)


def pickles_allowed(patch: pytest.MonkeyPatch) -> None:
    real = np.load
    patch.setattr(samples.np, "load", lambda path, **_: real(path, allow_pickle=True))


def unknown_fields_allowed(patch: pytest.MonkeyPatch) -> None:
    class Lenient(contract.Figures):
        model_config = contract.Figures.model_config | {"extra": "ignore"}

    patch.setattr(publish_step, "Figures", Lenient)


def link_to_a_secret(place: Place) -> None:
    place.model.unlink()
    place.model.symlink_to(place.secret)


def hard_link_to_a_secret(place: Place) -> None:
    place.model.unlink()
    os.link(place.secret, place.model)


def pipe(place: Place) -> None:
    place.model.unlink()
    os.mkfifo(place.model)


def worse_than_allowed(place: Place) -> None:
    path = place.workspace.proof / FIGURES
    content = json.loads(path.read_text())
    content["parity"] |= {"maxAbsoluteError": 1e9, "maxRelativeError": 0.5}
    path.write_text(json.dumps(content))


def a_note(place: Place) -> None:
    path = place.workspace.proof / FIGURES
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "trust me"}))


def golden_that_proves_nothing(place: Place) -> None:
    good = golden()
    save_golden(Golden(good.inputs, {"logits": np.ones((4, 10), np.float32)}), place.workspace.output / GOLDEN)


def golden_of_another_shape(place: Place) -> None:
    good = golden()
    eleven = np.random.default_rng(0).standard_normal((4, 11)).astype(np.float32)
    save_golden(Golden(good.inputs, {"logits": eleven}), place.workspace.output / GOLDEN)


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def golden_that_runs(place: Place) -> None:
    good = golden()
    arrays = {"inputs/image": good.inputs["image"], "outputs/logits": good.outputs["logits"]}
    evil = np.array([Malice(place.ran)], object)
    np.savez(place.workspace.output / GOLDEN, allow_pickle=True, **arrays, **{"inputs/evil": evil})


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def publishes(shown: Callable[[Place], bool]) -> Callable[[Place], None]:
    def show(place: Place) -> None:
        place.publish()
        assert shown(place)

    return show


def hangs(place: Place) -> None:
    with alarm(2), pytest.raises(TimeoutError):
        place.publish()


def runs(place: Place) -> None:
    with pytest.raises(StepFailed):
        place.publish()
    assert place.ran.exists()


def published_model(place: Place) -> bytes:
    return (place.prefix / "model/digits/1/model.onnx").read_bytes()


@dataclass(frozen=True)
class Control:
    forgery: str
    forge: Callable[[Place], None]
    remove: Callable[[pytest.MonkeyPatch], None]
    succeeds: Callable[[Place], None]


CONTROLS = [
    Control("a link to a secret", link_to_a_secret, no_inspection, publishes(lambda place: published_model(place) == SECRET)),
    Control(
        "a hard link to a secret", hard_link_to_a_secret, no_inspection, publishes(lambda place: published_model(place) == SECRET)
    ),
    Control("a pipe", pipe, no_inspection, hangs),
    Control(
        "figures beyond the limits, called passed",
        worse_than_allowed,
        no_second_judgement,
        publishes(lambda place: place.manifest()["parity"]["verdict"] == "Passed"),
    ),
    Control(
        "golden samples that prove nothing",
        golden_that_proves_nothing,
        no_second_judgement,
        publishes(lambda place: "golden/golden.npz" in place.manifest()["files"]),
    ),
    Control(
        "golden samples of other classes",
        golden_of_another_shape,
        no_comparison_with_the_version,
        publishes(lambda place: "golden/golden.npz" in place.manifest()["files"]),
    ),
    Control("golden samples that run a command", golden_that_runs, pickles_allowed, runs),
    Control("figures with a field of their own", a_note, unknown_fields_allowed, publishes(lambda place: bool(place.manifest()))),
]


@pytest.mark.parametrize("control", CONTROLS, ids=[control.forgery for control in CONTROLS])
def test_what_a_check_keeps_out_is_published_where_the_check_is_removed(control: Control, tmp_path: Path) -> None:
    place = Place(tmp_path / "checked")
    control.forge(place)
    with alarm(20), pytest.raises(StepFailed) as refused:
        place.publish()
    assert refused.value.reason is Reason.OUTPUT_REJECTED
    assert not (place.prefix / "manifest.json").exists()
    assert not place.ran.exists()

    unchecked = Place(tmp_path / "unchecked")
    control.forge(unchecked)
    with pytest.MonkeyPatch.context() as patch:
        control.remove(patch)
        control.succeeds(unchecked)


def test_a_checkpoint_of_other_bytes_is_taken_where_no_digest_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    (tmp_path / "checkpoints" / "v1.pt").write_bytes(b"other bytes")
    with pytest.raises(StepFailed) as refused:
        fetch_step.fetch(place.request, place.workspace, {})
    assert refused.value.reason is Reason.CHECKSUM_MISMATCH
    assert not place.workspace.checkpoint.exists()

    monkeypatch.setattr(fetch_step, "sha256_of", lambda _: place.request.checkpoint.sha256)
    fetch_step.fetch(place.request, place.workspace, {})
    assert place.workspace.checkpoint.read_bytes() == b"other bytes"


def test_an_override_of_any_field_is_in_config_pbtxt_where_the_list_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = 'backend: "python" default_model_filename: "golden.npz"'
    asked = request(triton__configOverrides=overrides)
    with pytest.raises(StepFailed) as refused:
        build_config(asked)
    assert refused.value.reason is Reason.INVALID_REQUEST

    monkeypatch.setattr(triton_config, "OVERRIDABLE", (*triton_config.OVERRIDABLE, "backend", "default_model_filename"))
    found = parse_config(build_config(asked))
    assert (found.backend, found.default_model_filename) == ("python", "golden.npz")
