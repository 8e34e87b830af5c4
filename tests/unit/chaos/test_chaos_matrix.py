"""docs/reliability.md promises what `make chaos` has seen, and nothing else."""

from __future__ import annotations

from chaos.report import BEGIN, DOCUMENT, END, ENOUGH
from chaos.scenarios import SCENARIOS


def rows() -> dict[str, list[str]]:
    text = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells] for cells in lines[1:]}


def test_every_scenario_was_played_and_kept_its_promise() -> None:
    found = rows()
    assert list(found) == [scenario.name for scenario in SCENARIOS]
    for scenario in SCENARIOS:
        _, done, requests, failed, _, verdict, *_ = found[scenario.name]
        assert done == scenario.done
        assert verdict == ("kept" if scenario.lossless else "counted")
        assert (failed == "0") or not scenario.lossless
        assert int(requests.replace(",", "")) > 0


def test_the_matrix_rests_on_enough_requests() -> None:
    assert sum(int(cells[2].replace(",", "")) for cells in rows().values()) >= ENOUGH
