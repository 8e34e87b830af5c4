"""The one way in which a step fails on purpose: a reason of the contract and a sentence for a human."""

from __future__ import annotations

from dataclasses import dataclass

from perch_exporter.contract import Accuracy, Parity, ParityTolerance, Reason, shorten

_LONGEST = 4000


@dataclass(frozen=True)
class Judged:
    """What the gates had found when one of them failed, and what parity was judged by."""

    parity: Parity
    tolerance: ParityTolerance
    accuracy: Accuracy | None = None


class StepFailed(Exception):
    """Says what failed, where, and the way out. `judged` comes along where a gate has figures to show."""

    def __init__(self, reason: Reason, message: str, judged: Judged | None = None) -> None:
        self.reason = reason
        self.message = one_line(message)
        self.judged = judged
        super().__init__(f"{reason}: {self.message}")


def one_line(text: str) -> str:
    """One printable line: messages quote other people's bytes, and end up in conditions, events and terminals."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return shorten(" ".join(clean.split()), _LONGEST)
