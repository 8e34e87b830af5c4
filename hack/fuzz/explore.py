"""Draws changed specs and tries each, without an end at the first that fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz.changes import Change, changes
from fuzz.server import Judge
from fuzz.trial import Finding
from perch.api import Spec
from perch.crd import build_schema

Attempt = tuple[dict[str, Any], list[Change]]


def attempts(bases: Sequence[dict[str, Any]]) -> st.SearchStrategy[Attempt]:
    """One of the valid specs, and changes to it."""
    schema = build_schema(Spec)
    return st.one_of([st.tuples(st.just(base), changes(schema, base)) for base in bases])


def try_attempt(judge: Judge, attempt: Attempt) -> bool:
    """Whether the changed spec is accepted. Raises Finding where it is and does not work."""
    spec, made = attempt
    for change in made:
        spec = change.made(spec)
    if not judge.accepts(spec):
        return False
    judge.try_children(spec)
    return True


def explore(
    judge: Judge, bases: Sequence[dict[str, Any]], examples: int, start: int, accepted: Callable[[str], object]
) -> dict[str, str]:
    """What was found, by its kind: the changes that led there first, and the error. `accepted` is told of what passed."""
    found: dict[str, str] = {}

    @seed(start)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(attempts(bases))
    def each(attempt: Attempt) -> None:
        told = "; ".join(map(str, attempt[1]))
        try:
            if try_attempt(judge, attempt):
                accepted(told)
        except Finding as finding:
            found.setdefault(kind_of(finding), f"{told}\n    {finding}")

    each()
    return found


def kind_of(finding: Finding) -> str:
    """The error without what differs from one spec to the next: quoted texts, numbers, indexes."""
    return re.sub(r"\"[^\"]*\"|'[^']*'|\d+", "…", str(finding))[:300]
