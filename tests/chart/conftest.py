"""The chart rendered with any values, and an API server of its own to install it on: the CRD is the release's there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apiserver import ApiServer, helm_command, running

CHART = Path(__file__).resolve().parents[2] / "charts/perch"
Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm without a cluster; values are given as `name=value`, or as a mapping for a values file."""
    folder = tmp_path_factory.mktemp("helm")
    command = helm_command(folder)

    def run(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments, str(CHART), "--values", "-"],
            input=yaml.safe_dump(values or {}),
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    def run(values: dict[str, Any] | None = None, release: str = "perch") -> list[dict[str, Any]]:
        result = helm("template", release, "--namespace", "perch-system", values=values)
        assert result.returncode == 0, result.stderr
        return [body for body in yaml.safe_load_all(result.stdout) if body]

    return run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running(tmp_path_factory.mktemp("apiserver")) as server:
        yield server
