"""The committed checkpoints, what training said about them, and the manifests that name them agree."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo import checkpoints, digits
from demo.story import CANARY, CANARY_TRAFFIC, FIRST, PROMOTED_TRAFFIC

VERSIONS = (1, 2)


def spec(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["spec"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_is_the_one_that_training_wrote_about(version: int) -> None:
    content = checkpoints.path(version).read_bytes()
    assert hashlib.sha256(content).hexdigest() == checkpoints.records()[version].sha256


@pytest.mark.parametrize("manifest", [FIRST, CANARY], ids=lambda path: path.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_manifest_names_the_checkpoint_by_its_digest(manifest: Path, version: int) -> None:
    entry = next(entry for entry in spec(manifest)["versions"] if entry["version"] == version)
    assert entry["checkpoint"]["sha256"] == checkpoints.records()[version].sha256
    assert entry["checkpoint"]["uri"].endswith(f"/v{version}.pt")


def test_the_canary_manifest_differs_from_the_first_in_traffic_and_rollout_alone() -> None:
    first, canary = spec(FIRST), spec(CANARY)
    assert {key for key in first | canary if first.get(key) != canary.get(key)} == {"traffic", "rollout"}
    assert first["traffic"] == {"stable": 1}
    assert canary["traffic"] == {"stable": 1, "canary": 2}
    assert canary["rollout"]["steps"] == [{"weight": 10, "hold": "Indefinite"}]


def test_the_promotion_is_one_change_of_the_canary_manifest() -> None:
    text = CANARY.read_text()
    assert text.count(CANARY_TRAFFIC) == 1
    promoted = yaml.safe_load(text.replace(CANARY_TRAFFIC, PROMOTED_TRAFFIC))["spec"]
    assert promoted == spec(CANARY) | {"traffic": {"stable": 2}}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_recorded_predictions_give_the_recorded_accuracy(version: int) -> None:
    record = checkpoints.records()[version]
    labels = digits.held_out()[1]
    assert len(record.predictions) == len(labels)
    right = sum(int(predicted) == label for predicted, label in zip(record.predictions, labels, strict=True))
    assert right / len(labels) == pytest.approx(record.accuracy, abs=5e-5)


def test_version_1_is_honestly_poor_and_version_2_good() -> None:
    records = checkpoints.records()
    assert records[1].epochs == 1
    assert 0.60 <= records[1].accuracy <= 0.85
    assert records[2].accuracy >= 0.97
