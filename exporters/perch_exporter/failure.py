"""The one way in which a step fails on purpose: a reason of the contract and a sentence for a human."""

from __future__ import annotations

from perch_exporter.contract import Parity, Reason, shorten

_LONGEST = 4000


class StepFailed(Exception):
    """Says what failed, where, and the way out. `parity` comes along where a gate has figures to show."""

    def __init__(self, reason: Reason, message: str, parity: Parity | None = None) -> None:
        self.reason = reason
        self.message = one_line(message)
        self.parity = parity
        super().__init__(f"{reason}: {self.message}")


def one_line(text: str) -> str:
    """One printable line: messages quote other people's bytes, and end up in conditions, events and terminals."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return shorten(" ".join(clean.split()), _LONGEST)
