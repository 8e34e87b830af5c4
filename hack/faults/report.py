"""docs/evidence.md from what the probe saw. Each sentence about the figures is written only where the figures bear it out."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.addons import PUBLIC_IMAGES
from faults.cases import Case
from faults.client import Outcome, Protocol, count
from faults.counters import Counts, Page

LOCK = Path(__file__).resolve().parents[1] / "images" / "requirements-tritonserver.txt"


@dataclass(frozen=True)
class Row:
    """One kind of failure in one protocol, and what was counted."""

    case: Case
    protocol: Protocol
    outcomes: Sequence[Outcome]
    triton: Counts
    """What grew; of `pending`, what is left."""
    pending: float | None
    """The most that was pending at a time; None where no server could be asked."""
    anew: bool
    """The server's counters began at 0 again."""
    envoy: Counts
    pod: str
    """What Kubernetes says of the Triton container afterwards."""

    @property
    def failures(self) -> dict[str, float]:
        return {name.removeprefix("failure "): value for name, value in self.triton.items() if name.startswith("failure")}

    @property
    def success(self) -> float:
        return self.triton.get("success", 0)

    @property
    def failed(self) -> int:
        """Requests that were without an answer, by the client's own account."""
        return sum(not outcome.ok for outcome in self.outcomes)

    def envoy_total(self, pattern: str) -> float:
        return sum(value for name, value in self.envoy.items() if re.search(pattern, name))


@dataclass(frozen=True)
class Golden:
    requests: float
    inferences: float
    again: float
    """Requests when the sidecar alone came back."""


@dataclass(frozen=True)
class Scrapes:
    idle: Sequence[Page]
    busy: Sequence[Page]
    envoy: Page
    late: Sequence[float]
    """Seconds from an answer until a look that shows it began."""


@dataclass(frozen=True)
class Split:
    """How a route with two backends dealt out requests, and what tells its backends apart."""

    turns: Mapping[Protocol, Sequence[int]]
    """Which requests of a protocol, by their number, the canary answered."""
    asked: int
    """Requests of each protocol."""
    clusters: Counts
    """Good answers by cluster."""
    endpoints: Counts
    """Good answers by backend."""
    told: Mapping[Protocol, str | None]
    """What a header of the filters said on a failed answer of the canary's."""


@dataclass(frozen=True)
class Findings:
    versions: Mapping[str, str]
    golden: Golden
    rows: Sequence[Row]
    scrapes: Scrapes
    splits: Mapping[str, Split]
    canary_weight: int

    def of(self, words: str) -> list[Row]:
        found = [row for row in self.rows if words in row.case.failure]
        if not found:
            raise LookupError(f"no case says {words!r}")
        return found


def versions(triton: str) -> dict[str, str]:
    onnxruntime = re.search(r"^onnxruntime==(\S+)", LOCK.read_text(), re.MULTILINE)
    return {
        "Triton": triton,
        "onnxruntime": onnxruntime[1] if onnxruntime else "?",
        "Envoy Gateway": PUBLIC_IMAGES["envoy-gateway"].rpartition(":")[2].removeprefix("v"),
        "Envoy": PUBLIC_IMAGES["envoy"].rpartition("-v")[2],
    }


# -- what the figures say

Claim = tuple[str, Callable[[Findings], bool]]


def _all(words: str, holds: Callable[[Row], bool]) -> Callable[[Findings], bool]:
    return lambda found: all(holds(row) for row in found.of(words))


def _every(*claims: Callable[[Findings], bool]) -> Callable[[Findings], bool]:
    return lambda found: all(claim(found) for claim in claims)


def _by(protocol: Protocol, claim: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: row.protocol != protocol or claim(row)


def _silent(row: Row) -> bool:
    return not row.success and not row.failures


def _only(reason: str) -> Callable[[Row], bool]:
    return lambda row: row.failures == {reason: row.failed} and row.success == len(row.outcomes) - row.failed


def _as_success(row: Row) -> bool:
    return row.success == len(row.outcomes) and not row.failures


def _lasting(row: Row) -> bool:
    return _only("BACKEND")(row) and row.failed == len(row.outcomes) and row.pod == "ready"


TRITON: tuple[Claim, ...] = (
    (
        "A run-time error of onnxruntime and an exception in a Python model are failures with the reason `BACKEND`, each request "
        "of the batch once, over a stream too.",
        _every(_all("run-time error", _only("BACKEND")), _all("exception in a Python model", _only("BACKEND"))),
    ),
    (
        "**An error response of a Python model is a success**, and `nv_inference_count` counts it too. Triton alone cannot "
        "see such a model fail.",
        _all("error response", _as_success),
    ),
    (
        "**A wrong answer is a success.** No counter anywhere shows it.",
        _all("wrong answer", _as_success),
    ),
    (
        "A slow answer is a success. It shows in `nv_inference_request_duration_us`, which failed requests do not add to.",
        _every(
            _all("slow answer", _as_success),
            lambda found: min(map(_mean, found.of("slow answer"))) > max(map(_mean, found.of("none:"))),
            _all("run-time error", lambda row: "duration µs" not in row.triton),
        ),
    ),
    (
        "What Triton refuses before it queues it is in no counter, neither as a success nor as a failure: too large a batch, a "
        "wrong shape, type or name, an unknown model or version.",
        _every(*(_all(words, _silent) for words in ("batch of 33", "input of", "unknown"))),
    ),
    (
        "**A request that finds the queue full is in no counter either**; one whose time in the queue runs out is `REJECTED`.",
        _every(
            _all("queue full", lambda row: not row.failures and row.success == len(row.outcomes) - row.failed),
            _all("queue policy", _only("REJECTED")),
        ),
    ),
    (
        "A client that gives up while its request is computed leaves a success behind: the backend computes to the end.",
        _all("while it is computed", lambda row: row.success == len(row.outcomes) == row.failed and not row.failures),
    ),
    (
        "A client that gives up in the queue leaves a `CANCELED` behind by gRPC, unless its request already was in the next "
        "batch. By REST it leaves a success: Triton computes for a connection that is closed.",
        _all(
            "in Triton's queue", lambda row: (row.failures.get("CANCELED", 0) > 0) == (row.protocol == "gRPC") and row.success > 0
        ),
    ),
    (
        "**A stall adds to nothing.** `nv_inference_pending_request_count` counts what waits, not what is computed: a stalled "
        "request by itself leaves it at 0; with others behind it, it stays at their number, even when their clients are long gone.",
        _every(
            _all("stall", _silent),
            _all("computes for ever", lambda row: row.pending == len(row.outcomes) - 1),
            _all("wait behind it", lambda row: row.triton.get("pending") == len(row.outcomes) - 1),
        ),
    ),
    (
        "When the process of a Python backend dies, of a crash or of the kernel's OOM killer, the server lives on and fails every "
        "request from then on, as `BACKEND`. The pod stays ready and nothing is restarted: only these counters tell.",
        _every(_all("crash of", _lasting), _all("out of memory", _lasting)),
    ),
    (
        "A server that is killed takes its counters along: what was in flight is in none, and the next server begins at 0, with the "
        "golden check's requests.",
        _all("SIGKILL", lambda row: row.anew and not row.failures),
    ),
)

GATEWAY: tuple[Claim, ...] = (
    (
        "Errors by REST are counted by their HTTP status. **Errors by gRPC are answers with status 200**, also in Envoy's own "
        "counters.",
        _every(
            *(
                _all(
                    words,
                    lambda row: (
                        row.envoy_total(r"^rule/\d+ upstream_rq 200$" if row.protocol == "gRPC" else " upstream_rq 5") == 20
                    ),
                )
                for words in ("run-time error in onnxruntime", "exception in a Python model", "error response")
            )
        ),
    ),
)


def _mean(row: Row) -> float:
    """Microseconds of a request that Triton says was served."""
    return row.triton.get("duration µs", 0) / max(1, row.success)


def line(row: Row) -> str:
    return f"{row.case.failure} | {row.protocol} | {count(row.outcomes)} | {dict(row.triton)} | {row.pending} | {dict(row.envoy)} | {row.pod} {row.anew}"
