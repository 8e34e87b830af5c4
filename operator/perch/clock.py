"""The operator's clock: the time of day when it started, and from then on a clock that never jumps."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta


class SteadyClock:
    """Tells the time of day, in UTC, and never goes back or leaps ahead.

    Holds, deadlines and looks are measured by it. A wall clock that is set by an hour in mid-rollout would end all of them at
    once, or none. What other clocks wrote (an operator on another node, a kubelet) is still another clock's.
    """

    def __init__(self) -> None:
        self._started, self._at = datetime.now(UTC), time.monotonic()

    def __call__(self) -> datetime:
        return self._started + timedelta(seconds=time.monotonic() - self._at)
