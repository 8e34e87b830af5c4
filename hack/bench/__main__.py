"""`make bench`: all measurements, one after the other, as JSON or lines of text. `--only` takes some of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bench import cutoff, exports, gather, journey, judge, served, settled
from devcluster import Cluster
from devcluster.release import install

ON_A_CLUSTER: dict[str, Callable[[Cluster], object]] = {
    "journey": lambda cluster: told(journey.measure(cluster)),
    "cutoff": lambda cluster: told(cutoff.measure(cluster)),
    "served": served.measure_all,
}
BY_ITSELF: dict[str, Callable[[], object]] = {
    "settled": lambda: told({"settled": settled.measure()}),
    "gather": lambda: told({"gather": gather.measure()}),
    "judge": lambda: print("\n".join(judge.report(1.0)), flush=True),
    "exports": lambda: exports.main([]),
}


def told(figures: Any) -> None:
    print(json.dumps(figures, indent=1), flush=True)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join([*ON_A_CLUSTER, *BY_ITSELF])}; several times.")] = None,
    name: Annotated[str, typer.Option(help="the cluster's name")] = "bench",
    keep: Annotated[bool, typer.Option(help="leave the cluster running")] = False,
) -> None:
    known = [*ON_A_CLUSTER, *BY_ITSELF]
    if unknown := set(only or []) - set(known):
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = only or known
    if any(one in wanted for one in ON_A_CLUSTER):
        cluster = Cluster(name, gpus=0)
        cluster.up()
        try:
            install(cluster)
            for one, measure in ON_A_CLUSTER.items():
                if one in wanted:
                    measure(cluster)
        finally:
            if not keep:
                cluster.down()
    # After it is gone: these have the machine to themselves.
    for one, alone in BY_ITSELF.items():
        if one in wanted:
            alone()


if __name__ == "__main__":
    typer.run(main)
