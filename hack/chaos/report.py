"""What came of the scenarios: a table for the terminal, and the matrix in docs/reliability.md."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.table import Table

from chaos.scenarios import SCENARIOS, Scenario
from chaos.stage import is_failed
from demo.load import Answer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by make chaos -->", "<!-- end of what make chaos writes -->"
MOST_TOLD = 700
ENOUGH = 10_000
"""Requests that a whole run sends at least."""
TITLES = ("scenario", "what was done", "requests", "failed", "seconds", "verdict", "what was seen", "date")


@dataclass(frozen=True)
class Result:
    scenario: Scenario
    requests: int
    failed: int
    seconds: float
    seen: str
    broken: str = ""
    """What was not as it should be, apart from lost requests."""

    @property
    def kept(self) -> bool:
        """Whether the promise was."""
        return not self.broken and not (self.failed and self.scenario.lossless) and self.requests > 0

    @property
    def verdict(self) -> str:
        if self.broken:
            return "BROKEN"
        if not self.scenario.lossless:
            return "counted"
        return "kept" if self.kept else "LOST"

    @property
    def told(self) -> str:
        return textwrap.shorten(self.broken or self.seen, MOST_TOLD, placeholder=" …")

    def row(self) -> list[str]:
        figures = [f"{self.requests:,}", f"{self.failed:,}", f"{self.seconds:.0f}"]
        return [self.scenario.name, self.scenario.done, *figures, self.verdict, self.told]


def summarize(scenario: Scenario, answers: list[Answer], seconds: float, seen: str, broken: str) -> Result:
    failures = [answer for answer in answers if is_failed(answer)]
    said = Counter((answer.error or "another answer than the checkpoint's")[:160] for answer in failures)
    words = [f"{count} × “{text}”" for text, count in said.most_common(3)]
    return Result(scenario, len(answers), len(failures), seconds, "; ".join(part for part in [seen, *words] if part), broken)


def build_table(results: Iterable[Result]) -> Table:
    table = Table("scenario", "requests", "failed", "seconds", "verdict", "what was seen")
    for result in results:
        name, _, *rest = result.row()
        table.add_row(name, *rest, style="" if result.kept else "red")
    return table


def write_matrix(results: Iterable[Result], today: date, document: Path = DOCUMENT) -> None:
    """Puts these rows into the document; those of scenarios that were not played stay, with the date on which they were."""
    before, _, rest = document.read_text().partition(BEGIN)
    former, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in former.splitlines() if line.startswith("| ")}
    for result in results:
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in [*result.row(), today.isoformat()]]
        rows[result.scenario.name] = f"| {' | '.join(cells)} |"
    kept = [rows[scenario.name] for scenario in SCENARIOS if scenario.name in rows]
    requests = sum(int(line.split("|")[3].replace(",", "")) for line in kept)
    head = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    text = "\n".join([BEGIN, "", *head, *kept, "", f"{requests:,} requests in all.", END])
    document.write_text(before + text + after)
