"""Waiting for a ModelDeployment as a person would: its Ready condition as it changes, and the last line of the export's log."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from devcluster.tenant import Tenant

Tell = Callable[[str], None]

STEPS = ("fetch", "convert", "prove", "publish")
"""Containers of an export Job."""
EXPORT_LABEL = "serving.perch.dev/component=export"
_LOG_PAUSE = 1.5


class NotReady(Exception):
    """The ModelDeployment stalled, or did not become Ready in time."""


def wait_ready(tenant: Tenant, name: str, tell: Tell, timeout: float) -> dict[str, Any]:
    """Until Ready is True for the generation that was applied last; returns the object. Tells each change of the condition."""
    started, told = time.monotonic(), ""
    with _changes(tenant, name, timeout) as changes:
        for found in changes:
            ready = condition(found, "Ready")
            text = f"{ready['reason']}: {ready['message']}" if ready else "(the operator has not seen this generation yet)"
            if text != told:
                told = text
                tell(f"{time.monotonic() - started:5.1f} s  {text}")
            if ready and ready["status"] == "True":
                return found
            if condition(found, "Stalled").get("status") == "True":
                raise NotReady(f"{name} stalled: {text}")
    raise NotReady(f"{name} was not Ready within {timeout:.0f} s; the last that was said: {told}")


def wait_reason(tenant: Tenant, name: str, reason: str, tell: Tell, timeout: float) -> None:
    """Until Ready has this reason for the generation that was applied last. Tells each new reason, and the last message."""
    started, told = time.monotonic(), ""
    with _changes(tenant, name, timeout) as changes:
        for found in changes:
            ready = condition(found, "Ready")
            if ready and ready["reason"] != told:
                told = ready["reason"]
                tell(f"{time.monotonic() - started:5.1f} s  {told}: {ready['message']}")
            if told == reason:
                return
    raise NotReady(f"{name} had not Ready with reason {reason} within {timeout:.0f} s; the last one was {told or 'none'}")


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """The condition if it speaks of the newest generation; an older one says nothing about what was applied."""
    conditions = found.get("status", {}).get("conditions", [])
    generation = found["metadata"]["generation"]
    return next((c for c in conditions if c["type"] == kind and c.get("observedGeneration") == generation), {})


def wait_published(tenant: Tenant, name: str, timeout: float) -> list[dict[str, Any]]:
    """Until every listed version is published, also those that serve nothing yet; returns status.versions."""
    with _changes(tenant, name, timeout) as changes:
        for found in changes:
            versions: list[dict[str, Any]] = found.get("status", {}).get("versions", [])
            for entry in versions:
                if entry["phase"] == "Failed":
                    raise NotReady(f"version {entry['version']} was not exported: {entry.get('message')}")
            if versions and all("artifactDigest" in entry for entry in versions):
                return versions
    raise NotReady(f"{name}: not every version was published within {timeout:.0f} s")


@contextmanager
def _changes(tenant: Tenant, name: str, timeout: float) -> Iterator[Iterator[dict[str, Any]]]:
    """The object now, and after every change; ends after `timeout`."""
    command = ["kubectl", "-n", tenant.namespace, "get", "modeldeployment", name, "--watch", '-o=jsonpath={@}{"\\n"}']
    environment = {**os.environ, **tenant.cluster.env()}
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as kubectl:
        limit = threading.Timer(timeout, kubectl.terminate)
        limit.start()
        try:
            assert kubectl.stdout
            yield (json.loads(line) for line in kubectl.stdout)
        finally:
            limit.cancel()
            kubectl.terminate()


@contextmanager
def following_exports(tenant: Tenant, tell: Tell) -> Iterator[None]:
    """Tells the newest log line of the export Jobs while the block runs."""
    over = threading.Event()

    def follow() -> None:
        told = ""
        while not over.wait(_LOG_PAUSE):
            lines = export_log(tenant, EXPORT_LABEL)
            if lines and lines[-1] != told:
                told = lines[-1]
                tell(told)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def export_log(tenant: Tenant, selector: str) -> list[str]:
    """The log lines so far of the export pods' containers, in the order in which these run, each as `container: text`."""
    flags = ["--all-containers", "--prefix", "--tail=200", "--ignore-errors"]
    text = tenant.kubectl("logs", "-l", selector, *flags, check=False)
    # kubectl's prefix is [pod/POD/CONTAINER]. A summary for the operator is JSON; the other lines say the same in words.
    pairs = [line.split("] ", 1) for line in text.splitlines() if line.startswith("[pod/") and "] " in line]
    told = [(prefix.rsplit("/", 1)[1], words) for prefix, words in pairs if not words.startswith("{")]
    return [f"{container}: {words}" for step in STEPS for container, words in told if container == step]
