"""Command line: python -m chaos [--only NAME] [--cluster chaos]. Ends with 1 if a promise was not kept."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from chaos.report import ENOUGH, Result, build_table, summarize, write_matrix
from chaos.scenarios import SCENARIOS, Scenario
from chaos.stage import GPUS, Broken, Stage
from devcluster import Cluster
from devcluster.paths import clusters_dir
from devcluster.release import install

console = Console(highlight=False)


def main(
    only: Annotated[list[str] | None, typer.Option(help="These scenarios alone; may be given several times.")] = None,
    cluster: Annotated[str, typer.Option(help="The cluster's name.")] = "chaos",
    keep: Annotated[bool, typer.Option(help="Leave the cluster running.")] = False,
) -> None:
    """Every fault under load, counted; the matrix goes into docs/reliability.md."""
    if unknown := set(only or []) - {scenario.name for scenario in SCENARIOS}:
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in SCENARIOS)}")
    wanted = [scenario for scenario in SCENARIOS if not only or scenario.name in only]
    native = Cluster(cluster, gpus=GPUS)
    native.up()
    try:
        install(native)
        stage = Stage(native, logs_of(cluster))
        stage.build()
        results: list[Result] = []
        for scenario in wanted:
            results.append(play(stage, scenario))
            # After each: what was seen is not lost with what comes after it.
            write_matrix(results, date.today())
    finally:
        if not keep:
            native.down()
    console.print(build_table(results))
    requests = sum(result.requests for result in results)
    console.print(f"{requests:,} requests, {sum(result.failed for result in results):,} failed")
    if not all(result.kept for result in results):
        sys.exit("a promise was not kept")
    if not only and requests < ENOUGH:
        sys.exit(f"fewer than {ENOUGH:,} requests: this proves too little")


def logs_of(cluster: str) -> Path:
    folder = clusters_dir() / ".logs" / cluster / "chaos"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def play(stage: Stage, scenario: Scenario) -> Result:
    console.print(f"[bold]{scenario.name}[/]: {scenario.done}", soft_wrap=True)
    seen, broken = "", ""
    try:
        stage.settle()
    except TimeoutError as error:
        return Result(scenario, 0, 0, 0.0, "", f"what the scenario before has left cannot be settled: {error}")
    began = time.monotonic()
    with stage.under_load():
        try:
            seen = scenario.play(stage)
        except (Broken, TimeoutError) as error:
            broken = str(error)
        except subprocess.CalledProcessError as error:
            broken = f"`{' '.join(error.cmd[:6])}`: {' '.join(getattr(error, '__notes__', []))}"
    result = summarize(scenario, stage.answers(), time.monotonic() - began, seen, broken)
    console.print(f"  {result.requests:,} requests, {result.failed} failed, {result.verdict}: {result.told}", soft_wrap=True)
    return result


if __name__ == "__main__":
    typer.run(main)
