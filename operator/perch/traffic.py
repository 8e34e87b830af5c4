"""Who gets how much traffic. Pure arithmetic, the most careful part of Perch.

Invariants (property-tested): weights sum to 100; no weight rises on a version that is not ready; at most two versions have
weight; when nothing can be improved the present weights stay, since all-zero and not-ready are both lost requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Readiness:
    """`full`: all pods ready, more traffic is welcome. `able`: some are, the present traffic is answered. `most`: three quarters
    are. `settled`: half of them are, and no more will come soon (the progress deadline has passed), so these must do."""

    full: bool = False
    able: bool = False
    most: bool = False
    settled: bool = False


NOT_READY = Readiness()


def decide_weights(
    stable: int,
    canary: int | None,
    canary_weight: int,
    readiness: Mapping[int, Readiness],
    present: Mapping[int, int],
    *,
    rescue: bool = False,
) -> dict[int, int] | None:
    """Return the weights to set now, in percent by version, or None while nothing has ever been ready.

    `present` are the weights in the route, empty when there is none. Only versions in traffic's `stable` and `canary` ever gain
    weight; a version that is in neither only ever loses it, and only to a ready stable.

    - stable ready, canary ready: the split that was asked for;
    - stable ready, canary ready in part: the canary keeps the share it has and gains nothing;
    - stable ready, canary not: all to stable (a first canary waits, a broken one is taken out);
    - stable ready in part only: it gains what is missing when that is a third of what it has at most, or it has most of its pods,
      or half of them and no more will come, or nobody else answers: a rollback does not wait for the last pod. Else it gains
      nothing;
    - `rescue`, from a canary that was aborted: one ready pod of stable's is enough, since few that answer are better than many
      that fail;
    - stable not ready: the present weights stay, whoever has them. Where nobody else answers, a ready canary without a share
      gets its share all the same. It is never given more because stable broke: it has the pods for its share, and was trusted
      with no more. At weight 100 the canary does not need stable.
    """
    share = 0
    if canary is not None:
        trial = readiness.get(canary, NOT_READY)
        if trial.full:
            share = canary_weight
        elif trial.able:
            # Ready in part: it keeps what it answers now, and gains nothing.
            share = min(canary_weight, present.get(canary, 0))
    if share == 100 and canary is not None:
        return {stable: 0, canary: 100}
    base = readiness.get(stable, NOT_READY)
    others_down = not any(
        weight > 0 and readiness.get(version, NOT_READY).able for version, weight in present.items() if version != stable
    )
    has = present.get(stable, 0)
    few_must_do = 3 * (100 - share) <= 4 * has or base.most or base.settled or others_down or rescue
    if not (base.full or (base.able and few_must_do)):
        rest = [version for version, weight in present.items() if weight > 0 and version != canary]
        down = len(rest) == 1 and not base.able and not readiness.get(rest[0], NOT_READY).able
        if canary is not None and down and present.get(canary, 0) == 0 and share > 0:
            return {rest[0]: 100 - share, canary: share}
        return _held(present)
    weights = {stable: 100 - share}
    if canary is not None:
        weights[canary] = share
    return weights


def _held(present: Mapping[int, int]) -> dict[int, int] | None:
    kept = dict(present)
    return kept if sum(kept.values()) == 100 else None
