"""Command line: python -m exports [--only NAME]. Ends with 1 if a case failed."""

from __future__ import annotations

import sys
import time
import uuid
from datetime import date
from typing import Annotated

import typer

from devcluster import Cluster
from devcluster.release import install
from devcluster.tenant import Tenant
from exports.cases import CASES
from exports.play import play
from exports.report import Result, write_table


def main(
    only: Annotated[list[str] | None, typer.Option(help="These cases alone; may be given several times.")] = None,
    cluster: Annotated[str, typer.Option(help="The cluster's name.")] = "exports",
    keep: Annotated[bool, typer.Option(help="Leave the cluster running.")] = False,
) -> None:
    """Every architecture, format and precision, one after the other; the table goes into docs/exports.md."""
    if unknown := set(only or []) - {case.name for case in CASES}:
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}")
    wanted = [case for case in CASES if not only or case.name in only]
    native = Cluster(cluster, gpus=0)
    native.up()
    try:
        install(native)
        run = uuid.uuid4().hex[:6]
        tenant = Tenant(native, f"exports-{run}").make()
        results: list[Result] = []
        for case in wanted:
            began = time.monotonic()
            results.append(play(tenant, case, f"exports-{run}"))
            # After each: what was seen is not lost with what comes after it.
            write_table(results, date.today())
            told = results[-1].failed or f"apart {results[-1].apart}"
            typer.echo(f"{case.name}: {time.monotonic() - began:.0f} s, {told}")
        tenant.delete()
    finally:
        if not keep:
            native.down()
    failed = [result.case.name for result in results if result.failed]
    typer.echo(f"{len(results) - len(failed)} of {len(results)} answered as torch does")
    if failed:
        sys.exit(f"not exported and served as torch answers: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
