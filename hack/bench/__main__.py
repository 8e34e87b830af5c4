"""`make bench`: all measurements, one after the other, as JSON or lines of text."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bench import cutoff, exports, journey, served, settled
from devcluster import Cluster
from devcluster.release import install


def main(name: Annotated[str, typer.Option(help="the cluster's name")] = "bench", keep: bool = False) -> None:
    cluster = Cluster(name, gpus=0)
    cluster.up()
    try:
        install(cluster)
        print(json.dumps(journey.measure(cluster), indent=1), flush=True)
        print(json.dumps(cutoff.measure(cluster), indent=1), flush=True)
        served.measure_all(cluster)
    finally:
        if not keep:
            cluster.down()
    print(json.dumps({"settled": settled.measure()}, indent=1), flush=True)
    exports.main([])


if __name__ == "__main__":
    typer.run(main)
