"""The development cluster's own promises: clusters beside each other, interrupted, broken, repaired, and gone without a trace.

Not part of `make test`, since it makes three clusters: docs/development.md has the command. To be run while no other cluster
comes or goes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from devcluster import Cluster
from devcluster.cluster import names
from devcluster.commands import capture
from devcluster.paths import clusters_dir

pytestmark = pytest.mark.timeout(2400)

A, B, C = OURS = ("life-a", "life-b", "life-c")
UP_WITHIN = 900
"""Seconds. Nothing has to be built: what the cache lacks would take longer."""
MARK = b"PERCH_DEVCLUSTER="


@pytest.fixture
def others() -> Iterator[list[str]]:
    """The clusters that stood here before; ours are gone afterwards, whatever happened."""
    for name in OURS:
        Cluster(name).down()
    yield names()
    for name in OURS:
        Cluster(name).down()


def look(others: list[str]) -> dict[str, set[str]]:
    """All that clusters make on a machine outside of their own processes, but for what names one of the `others`."""
    processes = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            marks = [word for word in environ.read_bytes().split(b"\0") if word.startswith(MARK)]
        except OSError:  # gone meanwhile
            continue
        processes |= {mark.decode() for mark in marks}
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    logs = [f"{link} to {link.readlink()}" for link in Path("/var/log/containers").glob("*") if link.is_symlink()]
    found = {
        "mounts": mounts,
        "network namespaces": listed("/run/netns"),
        "links": listed("/sys/class/net"),
        "routes": capture(["ip", "route", "show", "table", "all"]).splitlines(),
        "cgroups": [str(folder) for folder in Path("/sys/fs/cgroup").glob("**/perch-*") if folder.is_dir()],
        "processes": processes,
        "run folders": listed("/run/perch"),
        "clusters": names(),
        # Those of the loopback name no cluster, only the pod, and are removed together with the other one of it.
        "CNI's results": [name for name in listed("/var/lib/cni/results") if not name.startswith("cni-loopback-")],
        "links to logs": logs,
    }
    foreign = re.compile(rf"(^|/|perch-)({'|'.join(map(re.escape, others))})(/|-|$)") if others else None
    return {what: {each for each in those if not (foreign and foreign.search(each))} for what, those in found.items()}


def listed(folder: str) -> list[str]:
    return [entry.name for entry in Path(folder).iterdir()] if Path(folder).is_dir() else []


def begin(action: str, name: str) -> subprocess.Popen[str]:
    """A command line of its own, in a group of its own, which Ctrl-C would interrupt as a whole."""
    command = ["env", "--default-signal=INT", sys.executable, "-m", "devcluster", action, "--name", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=UP_WITHIN)
    return process.returncode, said


def up(name: str) -> float:
    began = time.monotonic()
    code, said = end(begin("up", name))
    assert code == 0, said
    return time.monotonic() - began


def answers(name: str) -> bool:
    """API server, S3 server and Gateway, each by its own port."""
    cluster = Cluster(name)
    if cluster.kubectl("get", "--raw=/readyz", check=False).stdout != "ok":
        return False
    gateway = "http://{}:{}".format(*cluster.gateway_address())
    try:
        healthy = httpx.get(f"{cluster.s3.host_endpoint}/health").is_success
        return healthy and httpx.get(gateway).status_code == 404  # there is no route yet
    except httpx.TransportError:
        return False


def wait(look: Callable[[], bool], what: str, seconds: float = UP_WITHIN) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def test_clusters_stand_beside_each_other_survive_what_ends_them_and_leave_nothing(others: list[str]) -> None:
    before = look(others)

    begun = {name: begin("up", name) for name in (A, B)}
    for name, process in begun.items():
        code, said = end(process)
        assert code == 0, said
        assert answers(name)
    assert Cluster(A).gateway_address() != Cluster(B).gateway_address()
    print(f"a second `up` of a cluster that stands: {up(A):.1f} s")

    # Ctrl-C in the middle, where some components run and others do not.
    interrupted = begin("up", C)
    wait(lambda: Cluster(C).components()["etcd"], "the third has begun")
    os.killpg(interrupted.pid, signal.SIGINT)
    code, said = end(interrupted)
    assert code == 130, said
    assert "the same command goes on from here" in said
    assert not all(Cluster(C).components().values()), "it was not in the middle"
    print(f"`up` after Ctrl-C: {up(C):.1f} s")
    assert answers(C)

    Cluster(A).stop_component("kube-apiserver", kill=True)
    assert not answers(A)
    assert answers(B)
    print(f"`up` after SIGKILL of the API server: {up(A):.1f} s")
    assert all(Cluster(A).components().values())
    assert answers(A)

    # One goes, and its neighbours never miss an answer.
    leaving, missed = begin("down", A), 0
    while leaving.poll() is None:
        missed += not answers(B)
    code, said = end(leaving)
    assert code == 0, said
    assert missed == 0
    assert answers(B)
    assert answers(C)
    left = look([*others, B, C])
    assert {what: those for what, those in left.items() if what not in ("links", "routes")} == {
        what: those for what, those in before.items() if what not in ("links", "routes")
    }

    for name in (B, C):
        Cluster(name).down()
        Cluster(name).down()  # nothing is there: nothing to do, and no error
    assert look(others) == before
    assert not [folder for folder in clusters_dir().iterdir() if folder.name in OURS]
