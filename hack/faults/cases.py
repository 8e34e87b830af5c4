"""Every kind of failure that the probe raises, and how. Each case is raised a known number of times, once for each protocol."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from faults import Kind
from faults.client import PROTOCOLS, Client, Outcome, Protocol, Request, at_once, in_background
from faults.stage import CANARY, MODEL, NOBODY, PYTHON, Backend, Stage

TIMES = 20
SLOW = 50
"""Turns of an answer that is slow, and not too slow to wait for."""
LONG = 2500
"""Turns of an answer that takes long enough to be given up: about a second."""
GIVE_UP = 0.15
"""Seconds after which a client gives up, well within a long answer."""
PATIENCE = 3.0
"""Seconds that a client waits for a server that stalls."""


@dataclass(frozen=True)
class Play:
    """One case in one protocol."""

    stage: Stage
    client: Client
    protocol: Protocol
    model: str

    def sound(self) -> Request:
        return Request(self.stage.image, self.model)

    def large(self) -> Request:
        """A quarter of a batch: Triton makes up the next batch while it computes, and the fifth has to stay in the queue."""
        return replace(self.sound(), images=self.stage.image.repeat(8, axis=0))

    def marked(self, kind: Kind, **how: int) -> Request:
        return replace(self.sound(), images=self.stage.marked(kind, **how))

    def one_by_one(self, request: Request) -> list[Outcome]:
        return [self.client.ask(self.protocol, request) for _ in range(TIMES)]

    def all_at_once(self, request: Request) -> list[Outcome]:
        return at_once(lambda: self.client.ask(self.protocol, request), TIMES)

    def ended(self) -> float:
        """How many requests Triton is done with, one way or the other."""
        counts = self.stage.triton(CANARY, self.model)
        return sum(value for name, value in counts.items() if name.startswith(("success", "failure")))

    def behind_a_long_one(self, send: Callable[[], Outcome]) -> list[Outcome]:
        """All at once while the one instance computes for somebody else, whose own request is in the counters too."""
        first = in_background(lambda: self.client.ask(self.protocol, self.marked(Kind.SLOW, turns=LONG)))
        time.sleep(GIVE_UP / 3)
        outcomes = at_once(send, TIMES)
        first.join()
        return outcomes


@dataclass(frozen=True)
class Case:
    failure: str
    act: Callable[[Play], list[Outcome]]
    backend: Backend = CANARY
    model: str = MODEL
    protocols: tuple[Protocol, ...] = PROTOCOLS
    lasting: bool = False
    """The pod does not recover by itself."""


def _given_up(play: Play, send: Callable[[Request], Outcome]) -> list[Outcome]:
    """One by one, each while it is computed and nothing waits behind it."""
    outcomes = []
    for _ in range(TIMES):
        before = play.ended()
        outcomes.append(send(play.marked(Kind.SLOW, turns=LONG)))
        play.stage.tenant.wait(play.ended, lambda ended, before=before: ended > before, every=0.1)  # type: ignore[misc]
    return outcomes


def _deadline(play: Play) -> list[Outcome]:
    return _given_up(play, lambda request: play.client.ask(play.protocol, request, GIVE_UP))


def _cancelled(play: Play) -> list[Outcome]:
    return _given_up(play, lambda request: play.client.leave(play.protocol, request, GIVE_UP))


def _deadline_in_queue(play: Play) -> list[Outcome]:
    return play.behind_a_long_one(lambda: play.client.ask(play.protocol, play.large(), GIVE_UP))


def _cancelled_in_queue(play: Play) -> list[Outcome]:
    return play.behind_a_long_one(lambda: play.client.leave(play.protocol, play.large(), GIVE_UP))


def _stall(play: Play) -> list[Outcome]:
    return [play.client.ask(play.protocol, play.marked(Kind.STALL), PATIENCE)]


def _behind_a_stall(play: Play) -> list[Outcome]:
    """The first stalls, all others wait behind it."""
    outcomes: list[Outcome] = []
    first = in_background(lambda: outcomes.extend(_stall(play)))
    time.sleep(GIVE_UP)
    waited = at_once(lambda: play.client.ask(play.protocol, play.sound(), PATIENCE), TIMES - 1)
    first.join()
    return outcomes + waited


def _kill_server(play: Play) -> list[Outcome]:
    """All in flight in one batch when the server dies."""
    outcomes: list[Outcome] = []
    requests = in_background(lambda: outcomes.extend(play.all_at_once(play.marked(Kind.SLOW, turns=LONG))))
    time.sleep(GIVE_UP)
    _kill(play)
    requests.join()
    return outcomes


def _ask_dead_server(play: Play) -> list[Outcome]:
    _kill(play)
    return play.one_by_one(play.sound())


def _kill(play: Play) -> None:
    for process in play.stage.processes(CANARY, "tritonserver"):
        process.kill()


CASES = (
    Case("none: sound requests, for comparison", lambda p: p.one_by_one(p.sound())),
    Case("run-time error in onnxruntime", lambda p: p.one_by_one(p.marked(Kind.ERROR))),
    Case(
        "run-time error in onnxruntime, all over one gRPC stream",
        lambda p: p.client.stream([p.marked(Kind.ERROR)] * TIMES),
        protocols=("gRPC",),
    ),
    Case("wrong answer", lambda p: p.one_by_one(p.marked(Kind.WRONG))),
    Case("slow answer", lambda p: p.one_by_one(p.marked(Kind.SLOW, turns=SLOW))),
    Case("batch of 33, maxBatchSize 32", lambda p: p.one_by_one(replace(p.sound(), images=p.stage.image.repeat(33, axis=0)))),
    Case("input of a wrong shape", lambda p: p.one_by_one(replace(p.sound(), images=p.stage.image[..., :27]))),
    Case("input of a wrong type", lambda p: p.one_by_one(replace(p.sound(), datatype="INT64"))),
    Case("input of an unknown name", lambda p: p.one_by_one(replace(p.sound(), input="picture"))),
    Case("unknown model", lambda p: p.one_by_one(replace(p.sound(), model="nonesuch"))),
    Case("unknown version", lambda p: p.one_by_one(replace(p.sound(), version="7"))),
    Case("client's time is up while it is computed", _deadline),
    Case("client cancels while it is computed", _cancelled),
    Case("client's time is up in Triton's queue", _deadline_in_queue),
    Case("client cancels in Triton's queue", _cancelled_in_queue),
    Case("stall: one request computes for ever", _stall, lasting=True),
    Case("stall: one request computes for ever, 19 wait behind it", _behind_a_stall, lasting=True),
    Case("crash of the backend's process (SIGFPE)", lambda p: p.one_by_one(p.marked(Kind.CRASH)), lasting=True),
    Case("out of memory", lambda p: p.one_by_one(p.marked(Kind.OOM)), lasting=True),
    Case("SIGKILL of the server, these in flight", _kill_server),
    Case("SIGKILL of the server, these right after it", _ask_dead_server),
    Case("no pods behind the Service", lambda p: p.one_by_one(p.sound()), backend=NOBODY),
    Case("exception in a Python model", lambda p: p.one_by_one(p.sound()), PYTHON, "raises"),
    Case("error response of a Python model", lambda p: p.one_by_one(p.sound()), PYTHON, "refuses"),
    Case("queue full (max_queue_size 2)", lambda p: p.all_at_once(p.sound()), PYTHON, "full"),
    Case("queue policy's timeout (50 ms, REJECT)", lambda p: p.all_at_once(p.sound()), PYTHON, "late"),
)
