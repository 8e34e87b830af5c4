"""A version's HorizontalPodAutoscaler, where `runtime.autoscaling` asks for one."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal
from typing import Any

from perch.api import PodMetric, Spec
from perch.builders import build_metadata
from perch.names import child_labels, serving_name
from perch.observed import Identity

_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E")


def build_autoscaler(identity: Identity, spec: Spec, version: int, minimum: int) -> dict[str, Any]:
    """Scales the version's Deployment from `minimum` pods up to maxReplicas. Raises ValueError where the spec asks for none."""
    scaling = spec.runtime.autoscaling
    if scaling is None:
        raise ValueError("runtime.autoscaling is not set")
    name = serving_name(identity.name, version)
    metrics = [_pod_metric(metric) for metric in scaling.pod_metrics or []]
    if scaling.target_cpu_utilization_percentage is not None:
        target = {"type": "Utilization", "averageUtilization": scaling.target_cpu_utilization_percentage}
        metrics.insert(0, {"type": "Resource", "resource": {"name": "cpu", "target": target}})
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": build_metadata(identity, name, child_labels(identity.name, "triton", version)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": minimum,
            "maxReplicas": scaling.max_replicas,
            "metrics": metrics,
        },
    }


def _pod_metric(metric: PodMetric) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": canonical(str(metric.average_value))}
    return {"type": "Pods", "pods": {"metric": {"name": metric.name}, "target": target}}


def canonical(quantity: str) -> str:
    """The quantity as the API server stores it. Written otherwise, it would look like somebody's edit at every pass."""
    value = amount(quantity)
    if quantity.endswith("i") and value >= 1024 and value == value.to_integral_value():
        return _scaled(int(value), 1024, _BINARY)
    return _scaled(int((value * 10**9).to_integral_value(ROUND_CEILING)), 1000, _DECIMAL)


def amount(quantity: str) -> Decimal:
    """The number that a quantity stands for."""
    number = quantity.rstrip("mkKMGTPEi")
    suffix = quantity[len(number) :]
    factor = Decimal(1024) ** _BINARY.index(suffix) if suffix.endswith("i") else Decimal(1000) ** (_DECIMAL.index(suffix) - 3)
    return Decimal(number) * factor


def _scaled(value: int, step: int, suffixes: tuple[str, ...]) -> str:
    """With the largest suffix that leaves a whole number."""
    power = 0
    while value and value % step == 0 and power < len(suffixes) - 1:
        value, power = value // step, power + 1
    return f"{value}{suffixes[power] if value else ''}"
