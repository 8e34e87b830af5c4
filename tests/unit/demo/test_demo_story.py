"""What the story makes of answers, and its user's repository."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo import checkpoints
from demo.load import Answer
from demo.repository import Repository
from demo.story import DemoFailed, expect_checkpoints_answers, expect_split, wait_until_moved
from devcluster.commands import StepError

RECORDS = checkpoints.records()


def answer(version: str, image: int = 0, predicted: str | None = None, answered: float = 0.0) -> Answer:
    said = predicted or RECORDS[int(version)].predictions[image]
    return Answer("grpc", image, answered, answered, version, int(said))


def load(*answers: Answer) -> Any:
    return SimpleNamespace(results=lambda: list(answers))


def test_answers_of_the_checkpoints_are_accepted() -> None:
    expect_checkpoints_answers([answer(version, image) for version in ("1", "2") for image in range(450)])


def test_one_answer_that_is_another_version_s_is_found() -> None:
    image = next(i for i in range(450) if RECORDS[1].predictions[i] != RECORDS[2].predictions[i])
    with pytest.raises(DemoFailed, match="1 are not"):
        expect_checkpoints_answers([answer("2"), answer("2", image, RECORDS[1].predictions[image])])


@pytest.mark.parametrize(("canary", "fine"), [(100, True), (63, True), (137, True), (61, False), (139, False), (0, False)])
def test_a_split_may_be_off_by_four_standard_deviations(canary: int, fine: bool) -> None:
    answers = [answer("2")] * canary + [answer("1")] * (1000 - canary)
    if fine:
        expect_split(answers, "grpc", "2", 0.1)
    else:
        with pytest.raises(DemoFailed, match=f"version 2 gave {canary} of 1000 grpc answers"):
            expect_split(answers, "grpc", "2", 0.1)


def test_traffic_has_moved_when_the_old_version_is_silent_for_a_while() -> None:
    now = time.monotonic()
    moved = wait_until_moved(
        load(answer("2", answered=now - 9), answer("1", answered=now - 5), answer("1", answered=now)), "1", 5
    )
    assert moved == now - 9


def test_traffic_that_does_not_move_fails_with_who_answers() -> None:
    now = time.monotonic() + 60
    with pytest.raises(DemoFailed, match=r"all traffic is on version 1 within 0 s; the latest answers: \{'1': 1, '2': 1\}"):
        wait_until_moved(load(answer("1", answered=now), answer("2", answered=now)), "1", 0.3)


def test_silence_is_not_a_move() -> None:
    with pytest.raises(DemoFailed):
        wait_until_moved(load(), "1", 0.3)


def test_reverting_two_commits_brings_the_first_manifest_back(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    for text in ("stable: 1\n", "stable: 1\ncanary: 2\n", "stable: 2\n"):
        change = repository.commit(text, f"digits: {text.split()[-1]}")
    assert "-canary: 2" in change
    repository.revert(2)
    assert repository.manifest.read_text() == "stable: 1\n"
    assert len(repository.log().splitlines()) == 5


def test_a_failure_of_git_is_a_steps_failure_with_gits_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(tmp_path / "scratch")
    with pytest.raises(StepError, match="HEAD~1"):
        repository.revert(1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepError, match="git is not installed"):
        repository.log()
