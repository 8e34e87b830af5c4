"""What needs root gets it as a whole, with the caller's cache and clusters, or says how."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from devcluster import Cluster
from devcluster.commands import StepError
from devcluster.privileges import hand_over

ROOT = Path(__file__).resolve().parents[3]
AS_CALLER = {"help", "lint", "generate", "shell", "simulate"}


def as_root(folder: Path, path: str, **programs: str) -> subprocess.CompletedProcess[str]:
    """`hack/as-root python -m demo` where these programs are found before what is in `path`."""
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    env = {"HOME": str(folder), "PATH": f"{folder}:{path}", "PYTHONPATH": "hack"}
    command = [ROOT / "hack" / "as-root", "python", "-m", "demo"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_another_user_goes_through_sudo_is_told_so_and_keeps_home_path_and_modules(tmp_path: Path) -> None:
    given = as_root(tmp_path, "/usr/bin:/bin", id="echo 1000", docker="exit 1", sudo='echo "$PERCH_BACKEND"; printf "%s\\n" "$@"')
    path = f"PATH={tmp_path}:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    kept = ["--preserve-env", "env", f"HOME={tmp_path}", path, "PYTHONPATH=hack"]
    assert given.stdout.splitlines() == ["native", *kept, "python", "-m", "demo"]
    assert given.stderr == "perch: this needs root: sudo python -m demo\n"
    for folder in (".cache/perch", ".local/state/perch"):
        assert (tmp_path / folder).is_dir(), "made by root it would be root's, with all that is above it"


def test_root_needs_no_sudo(tmp_path: Path) -> None:
    given = as_root(tmp_path, "", id="echo 0", python='echo "$@"')
    assert (given.stdout, given.stderr) == ("-m demo\n", "")


def test_without_root_and_sudo_one_sentence_says_what_is_missing(tmp_path: Path) -> None:
    given = as_root(tmp_path, "", id="echo 1000")
    assert given.returncode == 1
    assert given.stderr.splitlines() == [
        "perch: this needs root, and there is no sudo here: run it as root, or install sudo. It was: python -m demo"
    ]


def test_every_make_target_that_needs_root_asks_for_it() -> None:
    asks: dict[str, bool] = {}
    for name, recipe in re.findall(r"^([a-z0-9-]+):[^\n]*\n((?:\t[^\n]*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE):
        asks[name] = all("hack/as-root" in line for line in recipe.splitlines() if "$(PY)" in line)
    assert {name for name, root in asks.items() if not root} | {"help"} == AS_CALLER
    assert len(asks) > 10


def test_a_cluster_that_is_made_past_make_says_what_to_put_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_BACKEND", "native")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(StepError, match=r"needs root: .* put hack/as-root before the command"):
        Cluster("nothing").up()


def test_what_the_user_is_told_to_use_is_his(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid, **_: given.append((path, uid, gid)))
    hand_over(tmp_path)
    assert given == []
    monkeypatch.setenv("SUDO_UID", "1000")
    monkeypatch.setenv("SUDO_GID", "1001")
    hand_over(tmp_path)
    assert given == [(tmp_path, 1000, 1001), (tmp_path / "repository", 1000, 1001)]
