"""What Triton and Envoy count, read from their own metrics pages, and what changed between two readings."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx

Counts = Mapping[str, float]

_TRITON = {
    "nv_inference_request_success": "success",
    "nv_inference_request_failure": "failure",
    "nv_inference_count": "inferences",
    "nv_inference_exec_count": "executions",
    "nv_inference_request_duration_us": "duration µs",
    "nv_inference_queue_duration_us": "queue µs",
    "nv_inference_pending_request_count": "pending",
}
PENDING = "pending"

# Of the hundred counters of a cluster and of the listener: those that count requests, by status and by what went wrong.
_CLUSTER = re.compile(
    r"envoy_cluster_(upstream_rq|upstream_rq_(timeout|rx_reset|tx_reset|retry|pending_overflow|pending_failure_eject)"
    r"|upstream_cx_(connect_fail|destroy_remote_with_active_rq)|grpc_[A-Za-z]+_\d+"
    r"|endpoint_rq_(success|error))"
)
_LISTENER = re.compile(r"envoy_http_(downstream_rq_(xx|rx_reset|tx_reset)|no_route|no_cluster)")
_SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Page:
    text: str
    seconds: float


# A connection for each look, as after a pause; but not a TLS context for each, which would take many times as long as the look.
_CLIENT = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=5)


def fetch(url: str) -> Page:
    began = time.perf_counter()
    answer = _CLIENT.get(url)
    answer.raise_for_status()
    return Page(answer.text, time.perf_counter() - began)


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of all that has labels. (The client library's own parser gives every counter another name.)"""
    for line in text.splitlines():
        if found := _SAMPLE.fullmatch(line):
            yield found[1], dict(_LABEL.findall(found[2])), float(found[3])


def read_triton(text: str, model: str, version: str) -> Counts:
    """One model version's counters by short name; failures as `failure BACKEND`."""
    return {
        " ".join([_TRITON[name], *([labels["reason"]] if "reason" in labels else [])]): value
        for name, labels, value in samples(text)
        if name in _TRITON and (labels.get("model"), labels.get("version")) == (model, version)
    }


def read_envoy(text: str, route: str) -> Counts:
    """A route's clusters, as `rule/0 upstream_rq 503` and `rule/0 grpc_ModelInfer_13`, and the listener of all routes."""
    found: dict[str, float] = {}
    for name, labels, value in samples(text):
        cluster = labels.get("envoy_cluster_name", "")
        if _CLUSTER.fullmatch(name) and cluster.startswith(route):
            words = [cluster.removeprefix(route), name.removeprefix("envoy_cluster_"), labels.get("envoy_response_code", "")]
        elif _LISTENER.fullmatch(name) and labels.get("envoy_http_conn_manager_prefix", "").startswith("http-"):
            kind = labels.get("envoy_response_code_class")
            words = ["listener", name.removeprefix("envoy_http_"), f"{kind}xx" if kind else ""]
        else:
            continue
        key = " ".join(words).strip()
        found[key] = found.get(key, 0) + value  # of endpoints there are several
    return found


def changes(before: Counts, after: Counts) -> dict[str, float]:
    """What grew, and by how much; of a gauge, what is left."""
    grown = {name: value - before.get(name, 0) for name, value in after.items() if name != PENDING}
    return {name: value for name, value in (grown | {PENDING: after.get(PENDING, 0)}).items() if value}
