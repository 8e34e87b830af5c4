"""What came of the cases: rows of a table in docs/exports.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from devcluster.images import ROOT
from exports.cases import CASES, Case

DOCUMENT = ROOT / "docs" / "exports.md"
BEGIN, END = "<!-- written by make e2e-exports -->", "<!-- end of what make e2e-exports writes -->"
TITLES = ("what", "network", "checkpoint", "MB", "precision", "convert", "prove", "Ready", "apart", "date")
_MOST_TOLD = 300


@dataclass(frozen=True)
class Result:
    case: Case
    megabytes: float = 0
    """Of the checkpoint's file."""
    convert: float = 0
    prove: float = 0
    ready: float = 0
    """Seconds: of the two steps by the exporter's own word, and from apply to Ready."""
    apart: str = ""
    """Greatest difference from torch's answer, in standard deviations of that answer, or what was compared instead."""
    failed: str = ""

    def row(self, today: date) -> str:
        case = self.case
        kind = [case.name, case.network.removeprefix("torchvision:"), case.form, f"{self.megabytes:.1f}", case.precision]
        if self.failed:
            figures = [f"FAILED: {textwrap.shorten(self.failed, _MOST_TOLD, placeholder=' …')}".replace("|", "\\|"), "", "", ""]
        else:
            figures = [f"{self.convert:.1f}", f"{self.prove:.1f}", f"{self.ready:.0f}", self.apart]
        return f"| {' | '.join([*kind, *figures, today.isoformat()])} |"


def write_table(results: Iterable[Result], today: date, document: Path = DOCUMENT) -> None:
    """Puts these rows into the document; those of cases that were not played stay, with the date on which they were."""
    before, _, rest = document.read_text().partition(BEGIN)
    former, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in former.splitlines() if line.startswith("| ")}
    rows |= {result.case.name: result.row(today) for result in results}
    kept = [rows[case.name] for case in CASES if case.name in rows]
    head = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    document.write_text(before + "\n".join([BEGIN, "", *head, *kept, "", END]) + after)
