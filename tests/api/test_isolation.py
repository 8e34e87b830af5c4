"""The operator's process where something fails that is another's: a namespace, a kind of children, an object, a former leader."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apiserver import OPERATOR, ApiServer, running

from .test_operator_process import CRD, ROOT, Operator, condition, eventually, holder

WATCHED = ("one", "two")
SIX = {"httproutes": "gateway.networking.k8s.io", "networkpolicies": "networking.k8s.io", "deployments": "apps", "jobs": "batch"}
SIX |= {"poddisruptionbudgets": "policy", "horizontalpodautoscalers": "autoscaling"}
VERBS = ["get", "list", "watch", "create", "patch", "delete"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server that asks what the operator may do."""
    with running(tmp_path_factory.mktemp("guarded"), authorization="RBAC") as server:
        server.kubectl("apply", "--server-side", "-f", str(CRD))
        server.wait_established("modeldeployments.serving.perch.dev")
        everything = {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "verbs": ["get", "create", "update", "patch"],
        }
        allow(server, "default", [everything])
        for namespace in WATCHED:
            server.kubectl("create", "namespace", namespace)
            allow(server, namespace, rules())
        yield server


def rules(*, without: str = "") -> list[dict[str, Any]]:
    """The chart's rights where it watches."""
    kinds = {**SIX, "services": "", "pods": "", "events": "", "modeldeployments": "serving.perch.dev"}
    kinds["modeldeployments/status"] = "serving.perch.dev"
    return [{"apiGroups": [group], "resources": [kind], "verbs": VERBS} for kind, group in kinds.items() if kind != without]


def allow(server: ApiServer, namespace: str, granted: list[dict[str, Any]]) -> None:
    meta = {"name": "operator", "namespace": namespace}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": meta, "rules": granted}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": meta,
        "subjects": [{"kind": "User", "name": OPERATOR, "apiGroup": "rbac.authorization.k8s.io"}],
        "roleRef": {"kind": "Role", "name": "operator", "apiGroup": "rbac.authorization.k8s.io"},
    }
    for manifest in (role, binding):
        server.kubectl("apply", "-f", "-", text=yaml.safe_dump(manifest))


def deny(server: ApiServer, namespace: str) -> None:
    server.kubectl("delete", "role,rolebinding", "operator", "-n", namespace)


@contextmanager
def model(server: ApiServer, namespace: str, name: str) -> Iterator[Callable[[], dict[str, Any]]]:
    manifest = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
    manifest["metadata"] = {"name": name, "namespace": namespace}
    server.kubectl("apply", "-f", "-", text=yaml.safe_dump(manifest))
    yield lambda: json.loads(server.kubectl("get", "mdep", name, "-n", namespace, "-o", "json").stdout)
    server.kubectl("delete", "mdep", name, "-n", namespace, "--timeout=20s")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Operator]]:
    with ExitStack() as stack:

        def begin(server: ApiServer, name: str, kubeconfig: Path, namespaces: tuple[str, ...] = ()) -> Operator:
            watched = {"PERCH_WATCH_NAMESPACES": ",".join(namespaces)} if namespaces else {}
            operator = Operator(server, tmp_path, name, KUBECONFIG=str(kubeconfig), **watched)
            stack.callback(operator.end, signal.SIGKILL)
            return operator

        yield begin


def ready_reason(obj: dict[str, Any]) -> str:
    return str(condition(obj, "Ready").get("reason", ""))


def test_a_namespace_that_is_lost_harms_no_other_at_the_start_and_later(
    guarded: ApiServer, start: Callable[..., Operator]
) -> None:
    deny(guarded, "one")
    operator = start(guarded, "acting", guarded.operator_kubeconfig, WATCHED)
    eventually(lambda: holder(guarded) == "acting", "it takes the Lease though the first namespace is lost", 25)
    with model(guarded, "two", "here") as look:
        eventually(lambda: ready_reason(look()) == "Exporting", "the other namespace is served")
        for kind in ("ModelDeployment", "Deployment"):
            assert operator.metric("perch_watch_up", kind=kind, namespace="one") == 0
            assert operator.metric("perch_watch_up", kind=kind, namespace="two") == 1
        assert operator.says("namespace one")

        allow(guarded, "one", rules())
        with model(guarded, "one", "again") as other:
            eventually(lambda: ready_reason(other()) == "Exporting", "a namespace that comes back is taken in", 70)
            deny(guarded, "one")
            patch = '{"spec":{"runtime":{"terminationGracePeriodSeconds":77}}}'
            guarded.kubectl("patch", "mdep", "here", "-n", "two", "--type=merge", "-p", patch)
            eventually(lambda: look()["status"]["observedGeneration"] == 2, "the other goes on")
            assert operator.process.poll() is None
            allow(guarded, "one", rules())


def test_a_kind_that_may_not_be_listed_harms_only_those_who_need_it_and_they_say_so(
    guarded: ApiServer, start: Callable[..., Operator]
) -> None:
    allow(guarded, "one", rules(without="deployments"))
    allow(guarded, "two", rules(without="horizontalpodautoscalers"))
    operator = start(guarded, "partly", guarded.operator_kubeconfig, WATCHED)
    with model(guarded, "one", "blind") as blind, model(guarded, "two", "sound") as sound:
        eventually(lambda: ready_reason(sound()) == "Exporting", "it needs no autoscaler", 40)
        told = eventually(lambda: condition(blind(), "Ready"), "the other says what is missing", 40)
        assert told["reason"] == "WatchFailed"
        assert "deployments" in told["message"]
        assert operator.metric("perch_watch_up", kind="HorizontalPodAutoscaler", namespace="two") == 0
        jobs = guarded.kubectl("get", "jobs", "-n", "one", "-o", "name").stdout
        assert "blind" not in jobs, "nothing is done blindly"
        allow(guarded, "one", rules())
        eventually(lambda: ready_reason(blind()) == "Exporting", "it goes on by itself", 70)
    allow(guarded, "two", rules())


def test_a_label_that_is_taken_off_a_child_is_put_back_and_nothing_is_made_anew(
    guarded: ApiServer, start: Callable[..., Operator]
) -> None:
    def child(kind: str) -> dict[str, Any]:
        found = json.loads(guarded.kubectl("get", kind, "-n", "two", "-o", "json").stdout)["items"]
        (own,) = [c for c in found if c["metadata"]["name"].startswith("labelled-v1")]
        return dict(own["metadata"])

    def is_labelled(before: dict[str, Any]) -> bool:
        return child("job")["labels"] == before["labels"]

    operator = start(guarded, "labelling", guarded.operator_kubeconfig, WATCHED)
    with model(guarded, "two", "labelled") as look:
        eventually(lambda: ready_reason(look()) == "Exporting", "an export has begun", 40)
        before = child("job")
        # Not all of them: a Job without any label gets its template's.
        off = [f"{label}-" for label in before["labels"] if label.startswith("serving.perch.dev/")]
        guarded.kubectl("label", "job", before["name"], "-n", "two", *off)
        eventually(lambda: is_labelled(before), "while it watches")
        assert child("job")["uid"] == before["uid"]

        operator.end(signal.SIGTERM)
        guarded.kubectl("label", "job", before["name"], "-n", "two", *off)
        start(guarded, "labelling-again", guarded.operator_kubeconfig, WATCHED)
        eventually(lambda: is_labelled(before), "where it was away", 40)
        assert child("job")["uid"] == before["uid"]
        assert ready_reason(look()) == "Exporting"


# --- a former leader -------------------------------------------------------------------------------------------------------


class Line:
    """A TCP line to the API server that can be held: what a client sends stays in it, what the server sends goes through."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self._target = int(server.url.rsplit(":", 1)[1])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.held = 0
        """Bytes that wait."""
        self._open = threading.Event()
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()
        self.kubeconfig = folder / "line.kubeconfig"
        port = self._listener.getsockname()[1]
        self.kubeconfig.write_text(server.kubeconfig.read_text().replace(f":{self._target}", f":{port}"))

    def hold(self) -> None:
        self.held = 0
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            there = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._up, args=(client, there), daemon=True).start()
            threading.Thread(target=self._down, args=(there, client), daemon=True).start()

    def _up(self, client: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                self.held += len(data)
                self._open.wait()
                there.sendall(data)
        # Whatever was sent arrives, though the sender is gone.
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)

    def _down(self, there: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := there.recv(65536):
                client.sendall(data)


def test_a_status_that_a_paused_leader_sent_late_undoes_nothing(
    guarded: ApiServer, start: Callable[..., Operator], tmp_path: Path
) -> None:
    line = Line(guarded, tmp_path)
    paused = start(guarded, "paused", line.kubeconfig)
    eventually(lambda: holder(guarded) == "paused", "it takes the Lease", 25)
    start(guarded, "next", guarded.kubeconfig)
    with model(guarded, "default", "late") as look:
        eventually(lambda: look().get("status", {}).get("observedGeneration") == 1, "it is looked at", 40)

        def edit(seconds: int) -> None:
            patch = json.dumps({"spec": {"runtime": {"terminationGracePeriodSeconds": seconds}}})
            guarded.kubectl("patch", "mdep", "late", "--type=merge", "-p", patch)

        time.sleep(1)
        line.hold()
        edit(61)
        # The watch brings it the new generation; the status that it writes then stays in the line.
        eventually(lambda: line.held > 1000, "it writes")
        os.kill(paused.process.pid, signal.SIGSTOP)
        eventually(lambda: holder(guarded) == "next", "the other takes over", 30)
        eventually(lambda: look()["status"]["observedGeneration"] == 2, "and acts")
        edit(62)
        eventually(lambda: look()["status"]["observedGeneration"] == 3, "and goes on")
        before = look()
        line.release()
        os.kill(paused.process.pid, signal.SIGCONT)
        assert paused.process.wait(20) == 1
        time.sleep(2)
        after = look()
        assert after["status"] == before["status"]
        assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
        assert paused.says("Lease default/perch")
