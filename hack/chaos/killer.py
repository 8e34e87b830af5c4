"""The operator that kills itself: `python -m perch`, with SIGKILL right after its first write to the API server.

    CHAOS_KILL=1 python -m chaos.killer

So each life of it makes one write, and the next one finds what that has left. To the cluster it is the same to die after a write
or before the next one. Writes of the Lease and of Events do not count: the one is no part of a plan, the others are for humans.
Nor do refused ones, which change nothing. Everything else in the process is the operator as it is.
"""

import os
import signal
import sys
from typing import Any

from perch.__main__ import main
from perch.kube import Kube

SAYS = "chaos: write: "


def end_at_first_write(kill: bool) -> None:
    """Makes each write of `Kube` tell itself, and, if it is to kill, the first one the last thing that the process does."""
    send = Kube.request

    async def told(self: Kube, method: str, path: str, **more: Any) -> dict[str, Any]:
        if method == "GET" or "/leases" in path or path.endswith("/events"):
            return await send(self, method, path, **more)
        answer = await send(self, method, path, **more)
        print(f"{SAYS}{method} {path}", file=sys.stderr, flush=True)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    Kube.request = told  # type: ignore[method-assign]


if __name__ == "__main__":
    end_at_first_write(kill=bool(os.environ.get("CHAOS_KILL")))
    main()
