"""The operator killed at every write of a whole release: before it, and after it, one kill in each release."""

from __future__ import annotations

from collections import Counter
from typing import Any

from chaos.killer import NEVER
from chaos.outside import Outside
from chaos.stage import Broken, Stage, expect

MOST = 80
"""Writes that no release makes: an end, should one never complete without a kill."""


def kill_at_every_write(stage: Stage) -> str:
    """Releases to and fro: each makes the other version a canary, promotes it, and waits until the former one is gone."""
    # While there is an operator yet: what the scenario before has left is its to take away.
    stage.wait_gone(2)
    with stage.operator_away():
        # What an undisturbed release to this version leaves behind.
        wanted: dict[int, dict[str, Any]] = {}
        stable = 1
        for _ in range(2):
            with stage.operator_outside(NEVER):
                release(stage, stable)
            stable = 3 - stable
            wanted[stable] = stage.state()
        met: Counter[str] = Counter()
        lost: list[str] = []
        for moment in ("before", "after"):
            for number in range(1, MOST):
                failed = stage.failed()
                with stage.operator_outside(f"{moment}:{number}") as operator:
                    release(stage, stable)
                    stable = 3 - stable
                    reaches(stage, wanted[stable], f"after a kill {moment} write {number}")
                if not operator.killed:
                    break
                write = what(operator, number)
                met[write] += 1
                if stage.failed() > failed:
                    lost.append(f"{stage.failed() - failed} lost: killed {moment} write {number}, {write}")
            else:
                raise Broken(f"a release makes {MOST} writes and more")
        if stable == 2:
            with stage.operator_outside(NEVER):
                release(stage, stable)
    kinds = ", ".join(f"{count} at {write}" for write, count in sorted(met.items()))
    return "; ".join([f"{met.total()} kills: {kinds}; each time the same state was reached as without", *lost])


def release(stage: Stage, stable: int) -> None:
    other = 3 - stable
    stage.serve(stable, canary=other)
    stage.serve(other)
    stage.wait_gone(stable)


def reaches(stage: Stage, wanted: dict[str, Any], when: str) -> None:
    found = stage.wait(stage.state, lambda state: state == wanted, f"the state of an undisturbed release, {when}", 60)
    expect(found == wanted, when)


def what(operator: Outside, number: int) -> str:
    """The write at which the first life ended, as a kind: `PATCH deployments`."""
    method, path = operator.writes()[number - 1].split()
    plural, _, rest = path.partition("/namespaces/")[2].partition("/")[2].partition("/")
    return f"{method} {plural}{'/status' if rest.endswith('/status') else ''}"
