"""docs/evidence.md from what the probe saw. Each sentence about the figures is written only where the figures bear it out."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from devcluster.addons import PUBLIC_IMAGES
from faults.cases import TIMES, Case
from faults.client import Outcome, Protocol, count
from faults.counters import Counts, Page
from faults.stage import FAULTY, FILTERED, ORPHANED, PLAIN, SOUND

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


def _every_row(*claims: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: all(claim(row) for claim in claims)


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
        "A client that gives up in the queue leaves a `CANCELED` behind by gRPC, unless its request is in the next batch already, "
        "which Triton makes up while it computes: then a success. By REST always a success: Triton computes for a connection that "
        "is closed.",
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


def _code(status: str) -> Callable[[Row], bool]:
    return lambda row: row.envoy_total(rf"^rule/\d+ upstream_rq {status}$") == row.failed


def _without_status(row: Row) -> bool:
    """A client that gave up: where its request was, no status is counted for it."""
    return row.envoy_total("^listener downstream_rq_rx_reset") + row.envoy_total(r" grpc_ModelInfer_4$") >= row.failed


_STATUS = {"gRPC": "grpc_ModelInfer_14$", "REST": "upstream_rq 503$"}
_REFUSED = {"gRPC": "grpc_ModelInfer_3$", "REST": "upstream_rq 400$"}
_UNKNOWN = {"gRPC": "grpc_ModelInfer_5$", "REST": "no_route$"}

GATEWAY: tuple[Claim, ...] = (
    (
        "Errors by REST are counted by their HTTP status. **Errors by gRPC are answers with status 200**, for Triton sends them as "
        "such. Only with Envoy's gRPC statistics (`enableGRPCStats`) are they counted by their gRPC status.",
        _every(
            *(
                _every(
                    _all(
                        words,
                        _by("gRPC", _every_row(_code("200"), lambda row: row.envoy_total(r"grpc_ModelInfer_13$") == row.failed)),
                    ),
                    _all(words, _by("REST", _code("500"))),
                )
                for words in ("exception in a Python model", "error response", "crash of", "out of memory")
            )
        ),
    ),
    (
        "The statistics of single endpoints (`enablePerEndpointStats`) count such an error as one (`endpoint_rq_error`), by gRPC "
        "too, and an error that is the client's own as a success. They tell pods apart by address and know nothing of versions.",
        _every(
            _all("error response", lambda row: row.envoy_total("endpoint_rq_error") == row.failed),
            _all("input of", lambda row: row.envoy_total("endpoint_rq_success") == row.failed),
        ),
    ),
    (
        "An error inside of a gRPC stream is invisible to the gateway: the stream as a whole ends well.",
        _all(
            "over one gRPC stream",
            lambda row: row.envoy_total("grpc_ModelStreamInfer_0$") == 1 and not row.envoy_total("rq_error"),
        ),
    ),
    (
        "Refused for a full queue or for time that ran out in it: 503 by REST, status 14 by gRPC.",
        _all("queue", lambda row: "in Triton" in row.case.failure or row.envoy_total(_STATUS[row.protocol]) == row.failed),
    ),
    (
        "What Triton refuses before the queue is 400 by REST, 3 or 5 by gRPC; a model or version that is not routed never gets there.",
        _every(
            _all("batch of 33", lambda row: row.envoy_total(_REFUSED[row.protocol]) == row.failed),
            _all("input of", lambda row: row.envoy_total(_REFUSED[row.protocol]) == row.failed),
            _all("unknown model", lambda row: row.envoy_total(_UNKNOWN[row.protocol]) >= row.failed),
            _all("unknown version", lambda row: row.envoy_total(_UNKNOWN[row.protocol]) >= row.failed),
        ),
    ),
    (
        "A request that its client gives up has no status. It is a reset: `downstream_rq_rx_reset` of the listener, by gRPC "
        "`upstream_rq_tx_reset` of the cluster. A stall looks the same. (Some gRPC deadlines end at Triton first: status 4.)",
        _every(
            _all("while it is computed", _without_status),
            _all("computes for ever", _without_status),
        ),
    ),
    (
        "A dead server is a 503 of its cluster, by gRPC as well, from the first lost request on. Nothing is tried again.",
        _every(
            _all("SIGKILL", lambda row: row.failed > 0 and _code("503")(row)),
            lambda found: not any(row.envoy_total("upstream_rq_retry") for row in found.rows),
        ),
    ),
    (
        "Where a Service has no pods, no cluster counts anything: the 503 stands in the listener's counters alone, by gRPC as 2xx.",
        _all(
            "no pods",
            lambda row: (
                row.failed == TIMES
                and not row.envoy_total("^rule")
                and row.envoy_total(f"downstream_rq_xx {'2' if row.protocol == 'gRPC' else '5'}xx") == row.failed
            ),
        ),
    ),
)

APART: tuple[Claim, ...] = (
    (
        "**Two backends of a rule are one cluster**, `httproute/<namespace>/<name>/rule/<number>`: its counters do not tell stable "
        "from canary. The statistics of single endpoints do, by the addresses of the pods.",
        lambda found: (
            set(found.splits[PLAIN].clusters) == {"rule/0 upstream_rq 200", "rule/1 upstream_rq 200"}
            and set(found.splits[PLAIN].endpoints) == {SOUND, FAULTY}
        ),
    ),
    (
        "**With a filter on each backend there is a cluster for each**, `…/rule/<number>/backend/<place in backendRefs>`: every "
        "counter of a cluster tells stable from canary. A `ResponseHeaderModifier` that names the version will do, and then failed "
        "answers say which version failed, by both protocols.",
        lambda found: (
            all(
                name.split(" ")[0] in ("rule/0/backend/0", "rule/0/backend/1", "rule/1/backend/0", "rule/1/backend/1")
                for name in found.splits[FILTERED].clusters
            )
            and len(found.splits[FILTERED].clusters) == 4
            and all((told or "").startswith(FAULTY) for told in found.splits[FILTERED].told.values())
        ),
    ),
    (
        "**Without filters the gateway takes turns, with them it draws lots.** Within one cluster requests are dealt out in a fixed "
        "order (below: how far one request of the canary is from the next); separate clusters are chosen at random for each request, "
        "which is what a test of two versions supposes.",
        lambda found: statistics.pstdev(_gaps(found, PLAIN, "gRPC")) < 1 < statistics.pstdev(_gaps(found, FILTERED, "gRPC")),
    ),
    (
        "When the pods of one backend are gone, the rule's clusters change their names to those with a place, filters or not: a "
        "query that names a cluster loses sight of the rule.",
        lambda found: (
            set(found.splits[ORPHANED].clusters) == {"rule/0/backend/0 upstream_rq 200", "rule/1/backend/0 upstream_rq 200"}
        ),
    ),
)


def _gaps(found: Findings, route: str, protocol: Protocol) -> list[int]:
    turns = found.splits[route].turns[protocol]
    return [after - before for before, after in pairwise(turns)]


def _mean(row: Row) -> float:
    """Microseconds of a request that Triton says was served."""
    return row.triton.get("duration µs", 0) / max(1, row.success)


def not_seen(found: Findings) -> list[str]:
    """Sentences that these figures do not bear out."""
    return [sentence for sentence, holds in (*TRITON, *GATEWAY, *APART) if not holds(found)]


# -- Markdown


def line(row: Row) -> str:
    """One row of the table."""
    served = f"{row.success:.0f}" + (f" ({_mean(row) / 1000:.1f} ms)" if row.success else "")
    cells = [
        row.case.failure,
        row.protocol,
        count(row.outcomes),
        *(["–"] * 4 if row.pending is None else [
            served + (" since" if row.anew else ""),
            _listed(row.failures),
            f"{row.triton.get('executions', 0):.0f}",
            f"{row.pending:.0f}" + (f", {left:.0f} left" if (left := row.triton.get("pending", 0)) else ""),
        ]),
        _gateway(row),
        row.pod or "–",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _listed(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in counts.items()) or "0"


def _gateway(row: Row) -> str:
    """The cluster's counters by their short names; the listener's only where no cluster counted, or with what it alone knows."""
    named: dict[str, float] = {}
    for name, value in sorted(row.envoy.items()):
        where, metric = name.split(" ", 1)
        short = re.sub(r"^upstream_rq (\d+)$", r"\1", metric)
        short = re.sub(r"^grpc_(\w+)_(\d+)$", r"gRPC \2", short)
        if where != "listener" or not row.envoy_total("^rule") or short == "downstream_rq_rx_reset":
            named[short] = named.get(short, 0) + value
    return "; ".join(f"{name}: {value:.0f}" for name, value in named.items()) or "0"


def _sentences(claims: Sequence[Claim], found: Findings) -> str:
    return "\n".join(f"- {sentence}" for sentence, holds in claims if holds(found))


def _pages(pages: Sequence[Page]) -> str:
    times = [page.seconds * 1000 for page in pages]
    return f"{statistics.median(times):.1f} ms (median of {len(times)}; longest {max(times):.1f} ms)"


def _shared(found: Findings) -> str:
    lines = [
        "| route | protocol | answered by the canary | apart: mean | shortest | longest | standard deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    for route, words in ((PLAIN, "two backends, as they are"), (FILTERED, "a filter on each backend")):
        for protocol, turns in found.splits[route].turns.items():
            gaps = _gaps(found, route, protocol)
            figures = f"{statistics.mean(gaps):.1f} | {min(gaps)} | {max(gaps)} | {statistics.pstdev(gaps):.1f}"
            lines.append(f"| {words} | {protocol} | {len(turns)} of {found.splits[route].asked} | {figures} |")
    return "\n".join(lines)


def render(found: Findings) -> str:
    """The whole of docs/evidence.md."""
    seen, golden = found.scrapes, found.golden
    header = "| failure | by | the client saw | success (mean time) | failure | executions | most pending | gateway | container |"
    table = "\n".join([header, "|---" * 9 + "|", *(line(row) for row in found.rows)])
    late = [seconds for seconds in seen.late if seconds > 0]
    shown = (
        f"In all of {len(seen.late)} tries a look that began as soon as the answer was there showed it"
        if not late
        else f"In {len(seen.late) - len(late)} of {len(seen.late)} tries a look that began as soon as the answer was there showed it, "
        f"in the others one that began {max(late) * 1000:.1f} ms later at most"
    )
    return f"""<!-- Written by `python -m faults.probe` (hack/faults): change it there. -->
# Evidence: what each failure looks like

Perch judges a canary by counters. This page says which failures which counter shows, because it is not what their names suggest.
Every figure is one run of `python -m faults.probe`, which raises each kind of failure a known number of times in a live model behind
the gateway and reads the counters before and after. Each sentence below is written by the same program, and only when the run's
figures bear it out.

{", ".join(f"{name} {version}" for name, version in found.versions.items())}. {_NOT_NVIDIA}

## Triton's counters

Per model and version, at port 8002 of the pod; this is what Perch reads by default.

{_sentences(TRITON, found)}

The golden check counts as well: {golden.requests:.0f} requests with {golden.inferences:.0f} images of a pod that nobody has asked yet,
and {golden.again:.0f} more when the sidecar alone started again beside a Triton that served.

A look takes {_pages(seen.idle)} and {len(seen.idle[0].text) / 1000:.1f} kB for one version of one model, {_pages(seen.busy)} while it
serves about 100 requests a second; both on two cores that do everything else too. {shown}: Triton updates its counters as it answers.

## The gateway's counters

At port 19001 of the Envoy pod, `/stats/prometheus`; {len(seen.envoy.text) / 1000:.0f} kB here. `enableGRPCStats` and
`enablePerEndpointStats` of the EnvoyProxy (`spec.telemetry.metrics`) were on. They are off by default.

{_sentences(GATEWAY, found)}

### Telling stable from canary

{_sentences(APART, found)}

Shared {100 - found.canary_weight} to {found.canary_weight}, one request after the other:

{_shared(found)}

## Every kind, every counter

*success*, *failure*, *executions*: what `nv_inference_request_success`, `_failure` by reason and `nv_inference_exec_count` grew by
(*since*: the server is another one, which counted so much since its start). *most pending*: the largest
`nv_inference_pending_request_count` seen while it went on. *gateway*: what grew of the route's cluster; plain numbers are
`upstream_rq` by HTTP status, *gRPC n* are the gRPC statistics; of the listener, resets by the client, and everything where no
cluster counted. *container*: the Triton container afterwards.
Where requests wait behind a long or a stalled one, that one is counted too.

{table}

The rows up to the server's death are a faulty model that Perch serves, made by `hack/faults`: it passes every gate and fails on
images with a mark. The Python models and the Service without pods are the probe's own, outside of Perch, since no ONNX file can do
what they do. All of it is routed by the probe's own HTTPRoute with Perch's rules; a canary of Perch's would be aborted on the way.
"""


_NOT_NVIDIA = (
    "The onnxruntime backend is the development image's, over Triton's Python backend: the server, its queue, batches and counters are "
    "Triton's own, the processes are not those of NVIDIA's image. There onnxruntime runs inside of the server, so a crash or an OOM kill "
    "is the server's own death (last SIGKILL rows), not that of a process beside it. This has not been run here."
)
