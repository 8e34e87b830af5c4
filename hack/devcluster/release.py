"""Perch itself on a development cluster: its chart with the cluster's own images."""

import sys
from pathlib import Path

from devcluster.cluster import Cluster

CHART = Path(__file__).resolve().parents[2] / "charts" / "perch"
NAMESPACE = "perch-system"
RELEASE = "perch"


def install(cluster: Cluster, *values: str, wait: bool = True) -> None:
    """`helm upgrade --install`; `values` are further `--set` assignments, such as replicas=2."""
    operator, tag = cluster.images["perch-operator"].rsplit(":", 1)
    settings = [
        f"image.repository={operator}",
        f"image.tag={tag}",
        f"exporter.image={cluster.images['perch-exporter']}",
        f"artifacts.image={cluster.images['perch-artifacts']}",
        f"triton.image={cluster.images['perch-tritonserver-cpu']}",
        "imagePullPolicy=IfNotPresent",
        *values,
    ]
    flags = [word for setting in settings for word in ("--set-string" if setting.startswith("image.tag=") else "--set", setting)]
    waiting = ["--wait", "--timeout", "180s"] if wait else []
    cluster.helm("upgrade", "--install", RELEASE, CHART, "--namespace", NAMESPACE, "--create-namespace", *flags, *waiting)


if __name__ == "__main__":
    install(Cluster(sys.argv[1]))
