"""Perch's own Prometheus metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RECONCILES = Counter("perch_reconciles_total", "Passes over a ModelDeployment, by result.", ["result"])
RECONCILE_SECONDS = Histogram(
    "perch_reconcile_duration_seconds", "Duration of a pass.", buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
)
WRITES = Counter("perch_writes_total", "Writes to the API server, by action.", ["action"])
VERSIONS = Gauge("perch_versions", "Versions of all ModelDeployments, by phase.", ["phase"])
MODEL_DEPLOYMENTS = Gauge("perch_model_deployments", "ModelDeployments, by reason of their Ready condition.", ["reason"])
QUEUE_DEPTH = Gauge("perch_queue_depth", "ModelDeployments that wait for a pass.")
WATCHES = Gauge(
    "perch_watch_up", "1 while a kind is watched, 0 while it cannot be; namespace is empty for all.", ["kind", "namespace"]
)
LEADER = Gauge("perch_leader", "1 in the replica that holds the Lease.")
API_REQUESTS = Gauge("perch_api_requests", "Requests sent to the API server since start, watches included.")
SCRAPES = Counter("perch_scrapes_total", "Questions to pods (triton) and to Prometheus servers, by result.", ["source", "result"])
SCRAPE_SECONDS = Histogram(
    "perch_scrape_duration_seconds",
    "Duration of such a question.",
    ["source"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5),
)
