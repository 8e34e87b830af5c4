"""Numbers with what they count, as people read them. Pure."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """Such as 1 pod, 2 pods, 1,000 pods."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    return "is" if number == 1 else "are"
