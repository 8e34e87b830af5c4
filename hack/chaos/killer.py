"""The operator that kills itself: `python -m perch`, with SIGKILL right before or right after the n-th write to the API server.

    CHAOS_KILL=after:7 python -m chaos.killer

Writes of the Lease and of Events do not count: the one is no part of a plan, the others are for humans. The kill takes the place
of nothing: everything else in the process is the operator as it is.
"""

import os
import signal
import sys
from typing import Any

from perch.__main__ import main
from perch.kube import Kube

SAYS = "chaos: write"
NEVER = "never:0"


def count_writes(moment: str, number: int) -> None:
    """Makes each write of `Kube` say its number, and the one with this number the last thing that the process does."""
    send = Kube.request
    count = 0

    async def counted(self: Kube, method: str, path: str, **more: Any) -> dict[str, Any]:
        nonlocal count
        if method == "GET" or "/leases" in path or path.endswith("/events"):
            return await send(self, method, path, **more)
        count += 1
        mine = count
        print(f"{SAYS} {mine}: {method} {path}", file=sys.stderr, flush=True)
        if mine == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return await send(self, method, path, **more)
        finally:
            if mine == number and moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    Kube.request = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    when, _, which = os.environ.get("CHAOS_KILL", NEVER).partition(":")
    count_writes(when, int(which))
    main()
