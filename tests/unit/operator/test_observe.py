"""Facts read from raw objects, the queue, and the executor's manners. Objects are cut down to what is read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from perch.builders.jobs import build_export_job
from perch.cache import Cache
from perch.execute import execute
from perch.foreign import clean
from perch.kube import DEPLOYMENT, ApiError, refusal
from perch.names import ANNOTATION_EXPORT_HASH
from perch.observe import job_facts, observe, pod_trouble, pod_words, route_facts, serving_facts
from perch.observed import Identity, JobState, PodTrouble, matches
from perch.plan import Apply, Delete
from perch.reconcile import Queue
from perch_exporter.contract import ErrorReport, Outcome, Reason, Step, Summary
from tests.unit.operator.world import INSTALLATION, spec

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
IDENTITY = Identity("vision", "digits", "uid-1", 1, "1")
PARENT = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gateway", "namespace": "gateways"}


def route(*parents: dict[str, Any], generation: int = 2) -> dict[str, Any]:
    return {
        "metadata": {"name": "digits", "namespace": "vision", "generation": generation, "resourceVersion": "5"},
        "spec": {"parentRefs": [PARENT], "rules": [{"backendRefs": [{"name": "digits-v1", "weight": 100}]}]},
        "status": {"parents": list(parents)},
    }


def voice(
    accepted: str = "True", resolved: str = "True", generation: int = 2, words: str = "because", **ref: Any
) -> dict[str, Any]:
    conditions = [
        {"type": kind, "status": status, "reason": "Why", "message": words, "observedGeneration": generation}
        for kind, status in (("Accepted", accepted), ("ResolvedRefs", resolved))
    ]
    return {"parentRef": {**PARENT, **ref}, "conditions": conditions}


def partly(generation: int = 2, status: str = "True") -> dict[str, Any]:
    condition = {
        "type": "PartiallyInvalid",
        "status": status,
        "reason": "UnsupportedValue",
        "message": "Dropped Rule(s) [2 3]: …",
    }
    return {**voice(), "conditions": [*voice()["conditions"], {**condition, "observedGeneration": generation}]}


@pytest.mark.parametrize(
    ("parents", "accepted", "reason"),
    [
        pytest.param([], False, "AwaitingGateway", id="nobody has looked"),
        pytest.param([voice()], True, "Accepted", id="the Gateway has accepted this generation"),
        pytest.param([voice(generation=1)], False, "AwaitingGateway", id="only the former generation was accepted"),
        pytest.param([voice(accepted="False")], False, "Why", id="the Gateway refuses"),
        pytest.param([voice(resolved="False")], False, "Why", id="a backend is missing"),
        pytest.param([voice(name="other")], False, "AwaitingGateway", id="another Gateway spoke"),
        pytest.param([voice(namespace="elsewhere")], False, "AwaitingGateway", id="a Gateway of the same name elsewhere spoke"),
        pytest.param([voice(generation=1), voice()], True, "Accepted", id="a former controller's entry lingers"),
        pytest.param([partly()], False, "UnsupportedValue", id="the Gateway left out rules that it does not understand"),
        pytest.param([partly(generation=1)], True, "Accepted", id="the Gateway left out rules of the former generation"),
        pytest.param([partly(status="False")], True, "Accepted", id="the Gateway left out nothing and says so"),
    ],
)
def test_a_route_is_accepted_when_each_gateway_has_taken_in_this_very_generation(
    parents: list[dict[str, Any]], accepted: bool, reason: str
) -> None:
    facts = route_facts(route(*parents), "digits")
    assert (facts.accepted, facts.reason) == (accepted, reason)
    assert facts.weights == {1: 100}


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"name": name, **state}


PULL = {"reason": "ErrImagePull", "message": "no such image"}
BACK_OFF = {"reason": "CrashLoopBackOff"}
KILLED = {"exitCode": 137, "reason": "OOMKilled"}
TOLD = Summary(
    outcome=Outcome.FAILED,
    error=ErrorReport(reason=Reason.ARTIFACT_CORRUPT, message="model.onnx differs", retryable=False, step=Step.DOWNLOAD),
).to_json()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        pytest.param({"containerStatuses": [container("triton", state={"running": {}})]}, None, id="all is well"),
        pytest.param(
            {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "no nvidia.com/gpu"}]},
            "Unschedulable: no nvidia.com/gpu",
            id="the scheduler",
        ),
        pytest.param(
            {"initContainerStatuses": [container("download", state={"waiting": PULL})]},
            "download: ErrImagePull: no such image",
            id="the kubelet",
        ),
        pytest.param(
            {"initContainerStatuses": [container("download", state={"terminated": {"exitCode": 3, "message": TOLD}})]},
            "download ended with code 3: model.onnx differs (ArtifactCorrupt)",
            id="the exporter's sentence",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "triton",
                        state={"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={"terminated": {"exitCode": 127, "message": "first line\nlibfoo.so: cannot open"}},
                    )
                ]
            },
            "triton crashes again and again (CrashLoopBackOff), code 127: libfoo.so: cannot open",
            id="a crash loop with its last words",
        ),
        pytest.param(
            {"initContainerStatuses": [container("convert", state={"terminated": KILLED})]},
            "convert was killed for want of memory, of which it may have 2Gi (OOMKilled): raise builder.resources.limits.memory",
            id="out of memory",
        ),
        pytest.param(
            {"initContainerStatuses": [container("prove", state={"terminated": KILLED})]},
            "prove was killed for want of memory, of which it may have 2Gi (OOMKilled): raise builder.resources.limits.memory",
            id="out of memory while proving",
        ),
        pytest.param(
            {"containerStatuses": [container("publish", state={"terminated": KILLED})]},
            "publish was killed for want of memory, of which it may have 512Mi (OOMKilled): Perch sets this limit. "
            "Please report it, with the shapes of the version's inputs and outputs",
            id="out of memory that nobody can raise",
        ),
        pytest.param(
            {"containerStatuses": [container("triton", lastState={"terminated": KILLED}, state={"waiting": BACK_OFF})]},
            "triton was killed for want of memory (OOMKilled): raise runtime.resources.limits.memory",
            id="out of memory where no limit is known",
        ),
        pytest.param(
            {
                "phase": "Failed",
                "reason": "Evicted",
                "message": 'Usage of EmptyDir volume "output" exceeds the limit "50Gi". ',
                "initContainerStatuses": [container("convert", state={"terminated": {"exitCode": 137, "reason": "Error"}})],
            },
            'Evicted: Usage of EmptyDir volume "output" exceeds the limit "50Gi".',
            id="a filled disk",
        ),
    ],
)
def test_a_pods_own_words(status: dict[str, Any], words: str | None) -> None:
    limits = {"convert": "2Gi", "prove": "2Gi", "publish": "512Mi"}
    spec = {"containers": [{"name": name, "resources": {"limits": {"memory": most}}} for name, most in limits.items()]}
    assert pod_words({"metadata": {}, "spec": spec, "status": status}) == words


SEGFAULT = """\
I1201 06:36:33.133169 1 http_server.cc:4713] "Started HTTPService at 0.0.0.0:8000"
Signal (11) received.
 0# 0x0000563B2A69F52D in tritonserver
 1# 0x00007FB61DA5A050 in /lib/x86_64-linux-gnu/libc.so.6
12# triton::server::HTTPAPIServer::HandleInfer(evhtp_request*, std::string const&) in tritonserver
13# 0x00007FB61DB278EC in /lib/x86_64-linux-gnu/libc.so.6

I1201 06:37:07.364995 21 pb_stub.cc:2145]  Non-graceful termination detected.
"""
TRACEBACK = """\
2026-12-01 INFO fetching
Traceback (most recent call last):
  File "/opt/perch/nets.py", line 3, in build
    import requests
    ^^^^^^^^^^^^^^^
ModuleNotFoundError: No module named 'requests'
"""
NOT_LOADED = """\
E1201 06:33:47.687272 1 model_lifecycle.cc:642] "failed to load 'digits' version 1: Internal: no such file"
+--------+---------+--------+
| digits | 1       | UNAVAILABLE: Internal: no such file |
+--------+---------+--------+
I1201 06:33:47.764344 1 server.cc:305] "Waiting for in-flight requests to complete."
error: creating server: Internal - failed to load all models
"""
ABORT = """\
terminate called after throwing an instance of 'std::bad_alloc'
  what():  std::bad_alloc
Signal (6) received.
 0# 0x0000563B2A69F52D in tritonserver
"""


@pytest.mark.parametrize(
    ("log", "line"),
    [
        pytest.param(SEGFAULT, "Signal (11) received.", id="a signal before its backtrace"),
        pytest.param("7# main in tritonserver\nI1201 pb_stub.cc] ended\n", "I1201 pb_stub.cc] ended", id="half a backtrace"),
        pytest.param(TRACEBACK, "ModuleNotFoundError: No module named 'requests'", id="an exception"),
        pytest.param(NOT_LOADED, "error: creating server: Internal - failed to load all models", id="the last error"),
        pytest.param(ABORT, "terminate called after throwing an instance of 'std::bad_alloc'", id="an exception nobody caught"),
        pytest.param("one\ntwo\n\n", "two", id="plain words"),
        pytest.param(" 0# 0x0 in a\n 1# 0x1 in b\n", "1# 0x1 in b", id="nothing but a backtrace"),
        pytest.param("x" * 2000, "x" * 500, id="a long line"),
        pytest.param(" \n ", "Error", id="nothing"),
    ],
)  # fmt: skip
def test_the_line_of_a_log_that_says_why_it_ended_is_quoted(log: str, line: str) -> None:
    ended = {"exitCode": 139, "reason": "Error", "message": log}
    status = {"containerStatuses": [container("triton", state={"terminated": ended})]}
    assert pod_words({"metadata": {}, "status": status}) == f"triton ended with code 139: {line}"


def attempt(name: str, minute: int, *statuses: dict[str, Any]) -> dict[str, Any]:
    owner = {"controller": True, "uid": "job-1"}
    metadata = {"name": name, "creationTimestamp": f"2026-01-01T10:0{minute}:00Z", "ownerReferences": [owner]}
    resources = {"limits": {"memory": "2Gi"}}
    spec = {"initContainers": [{"name": "convert", "resources": resources}], "containers": [{"name": "publish"}]}
    return {"metadata": metadata, "spec": spec, "status": {"initContainerStatuses": list(statuses)}}


def export_job(*conditions: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "digits-v1-0123abcd", "uid": "job-1", "labels": {}, "annotations": {}}
    return {"metadata": metadata, "spec": {"activeDeadlineSeconds": 90}, "status": {"conditions": list(conditions)}}


OUT_OF_MEMORY = container("convert", state={"terminated": KILLED})
AT_WORK = container("convert", state={"running": {}})
LIMIT_REACHED = {
    "type": "Failed",
    "status": "True",
    "reason": "BackoffLimitExceeded",
    "message": "Job has reached the specified backoff limit",
    "lastTransitionTime": "2026-01-01T10:09:00Z",
}
TOO_LATE = {
    **LIMIT_REACHED,
    "reason": "DeadlineExceeded",
    "message": "Job was active longer than specified deadline",
}


@pytest.mark.parametrize(
    ("job", "pods", "words"),
    [
        pytest.param(export_job(), [attempt("a", 1, AT_WORK)], None, id="the first attempt is at work"),
        pytest.param(export_job(), [attempt("a", 1, OUT_OF_MEMORY)], "may have 2Gi (OOMKilled)", id="it is out of memory"),
        pytest.param(
            export_job(),
            [attempt("b", 2, AT_WORK), attempt("a", 1, OUT_OF_MEMORY)],
            "may have 2Gi (OOMKilled): raise builder.resources.limits.memory",
            id="the attempt before was out of memory, and the next one is at work",
        ),
        pytest.param(
            export_job(LIMIT_REACHED),
            [attempt("a", 1, OUT_OF_MEMORY)],
            "may have 2Gi (OOMKilled)",
            id="it was out of memory always",
        ),
        pytest.param(
            export_job(TOO_LATE),
            [],
            "it took longer than its 90 s and was ended (DeadlineExceeded): raise builder.activeDeadlineSeconds",
            id="the deadline has passed, and its pods are deleted",
        ),
        pytest.param(
            export_job(TOO_LATE),
            [attempt("a", 1, OUT_OF_MEMORY)],
            "longer than its 90 s",
            id="the deadline has passed, pods linger",
        ),
    ],
)
def test_an_export_jobs_words(job: dict[str, Any], pods: list[dict[str, Any]], words: str | None) -> None:
    said = job_facts(job, pods).words
    assert words in said if words and said else said == words


def with_proxy(*, code: int, phase: str = "Running") -> dict[str, Any]:
    """An export pod into which a service mesh put a container that never ends."""
    proxy, publish = container("proxy", state={"running": {}}), container("publish", state={"terminated": {"exitCode": code}})
    found = attempt("a", 1)
    status = {"phase": phase, "containerStatuses": [proxy, publish]}
    return {**found, "spec": {"containers": [{"name": "proxy"}, {"name": "publish"}]}, "status": status}


def test_a_container_that_others_put_into_the_pod_and_that_never_ends_does_not_hold_an_export_up() -> None:
    assert job_facts(export_job(), [with_proxy(code=0)]).state is JobState.SUCCEEDED
    assert job_facts(export_job(), [with_proxy(code=3)]).state is JobState.FAILED
    # The kubelet has ended the pod as a whole: the Job controller's word counts, and comes at once.
    assert job_facts(export_job(), [with_proxy(code=3, phase="Failed")]).state is JobState.RUNNING
    assert job_facts(export_job(), [attempt("a", 1, AT_WORK)]).state is JobState.RUNNING


HOSTILE = "no such file\r\n2026-01-01 perch [INFO] all is well\x1b[2J \u202edexob\u202c\u200b end"
CLEANED = "no such file 2026-01-01 perch [INFO] all is well [2J dexob end"


def claim(container_name: str, **error: Any) -> dict[str, Any]:
    """What a container says of itself when somebody's code writes its termination message."""
    report = {"reason": "ExportFailed", "message": HOSTILE, "retryable": True, "step": "publish", **error}
    message = json.dumps({"schema": "perch.dev/summary/v1", "outcome": "Failed", "error": report})
    return container(container_name, state={"terminated": {"exitCode": 4, "message": message}})


def test_a_container_says_what_went_wrong_and_nothing_else_of_what_it_claims_counts() -> None:
    summary = job_facts(export_job(LIMIT_REACHED), [attempt("a", 1, claim("convert"))]).summary
    assert summary is not None
    assert summary.error is not None
    assert (summary.error.step, summary.error.retryable) == (Step.CONVERT, False), "its own step, and what the reason allows"
    assert summary.error.message == CLEANED


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(
            lambda: pod_words({"metadata": {}, "status": {"initContainerStatuses": [claim("convert")]}}), id="an exporter's words"
        ),
        pytest.param(
            lambda: pod_words(
                {
                    "metadata": {},
                    "status": {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": HOSTILE}]},
                }
            ),
            id="the scheduler's words",
        ),
        pytest.param(
            lambda: pod_words({"metadata": {}, "status": {"phase": "Failed", "message": HOSTILE}}), id="the kubelet's words"
        ),
        pytest.param(
            lambda: pod_words(
                {
                    "metadata": {},
                    "status": {
                        "initContainerStatuses": [container("fetch", state={"waiting": {"reason": "x", "message": HOSTILE}})]
                    },
                }
            ),
            id="why a container waits",
        ),
        pytest.param(
            lambda: route_facts(route(voice(accepted="False", words=HOSTILE)), "digits").message,
            id="a Gateway's words",
        ),
        pytest.param(lambda: refusal(422, json.dumps({"message": HOSTILE})).message, id="an admission webhook's words"),
        pytest.param(lambda: refusal(500, HOSTILE).message, id="words of what stands in front of the API server"),
    ],
)
def test_words_of_others_are_on_one_line_and_hold_nothing_that_a_terminal_obeys(said: Callable[[], str | None]) -> None:
    text = said()
    assert text is not None
    assert CLEANED in text
    assert text.isprintable()


def test_words_of_others_are_bounded() -> None:
    assert len(clean("x" * 5_000_000)) <= 1000
    assert clean("begin " + "x" * 5_000_000 + " the cause").endswith("the cause")
    assert clean("kept as it is, even: ä € 你好") == "kept as it is, even: ä € 你好"


def test_what_an_export_was_made_of_is_read_back_from_its_job() -> None:
    asked = spec(1, builder={"nodeSelector": {"disk": "fast"}})
    job = build_export_job(IDENTITY, asked, asked.versions[0], "0123abcd", INSTALLATION)
    seen = job_facts({**job, "metadata": {**job["metadata"], "uid": "job-1"}}, [])
    assert seen.export_hash == job["metadata"]["annotations"][ANNOTATION_EXPORT_HASH]
    assert job_facts(export_job(), []).export_hash is None


MISMATCH = Summary(
    outcome=Outcome.FAILED,
    error=ErrorReport(
        reason=Reason.GOLDEN_MISMATCH, message="digits version 2 differs: 3.1 > 0.001", retryable=False, step=Step.GOLDEN
    ),
).to_json()
CRASH = {"exitCode": 134, "message": "loading\nabort: no kernel image", "startedAt": "2026-01-01T10:00:00Z"}
SHORT, LONG = {**CRASH, "finishedAt": "2026-01-01T10:00:30Z"}, {**CRASH, "finishedAt": "2026-01-01T12:00:00Z"}
KILLED_FOR_MEMORY = {**SHORT, "exitCode": 137, "reason": "OOMKilled"}
RUNS = {"running": {"startedAt": "2026-01-01T12:00:02Z"}}
BACKING_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
AT_LAST_END, LATER = "2026-01-01T12:00:01Z", "2026-01-01T12:30:00Z"


def pod(
    triton: dict[str, Any] | None = None, golden: dict[str, Any] | None = None, unready_since: str = AT_LAST_END, **more: Any
) -> dict[str, Any]:
    """A pod whose containers run and are ready, but for what is told."""
    containers = [
        {"name": name, "ready": True, "started": True, "restartCount": 0, "state": RUNS, **(told or {})}
        for name, told in (("triton", triton), ("golden", golden))
    ]
    ready = all(c["ready"] for c in containers)
    condition = {
        "type": "Ready",
        "status": "True" if ready else "False",
        "lastTransitionTime": unready_since,
        "message": "" if ready else "containers with unready status",
    }
    return {
        "metadata": {"name": "digits-v2-a"},
        "status": {"phase": "Running", "conditions": [condition], "containerStatuses": containers, **more},
    }


def unready(**more: Any) -> dict[str, Any]:
    return {"ready": False, **more}


def test_a_pod_that_waits_for_its_golden_check_says_where_to_look() -> None:
    assert "kubectl logs digits-v2-a -c golden" in str(pod_words(pod(golden=unready())))
    assert pod_words(pod()) is None
    assert pod_words(pod(unready(), unready())) is None, "Triton is still loading"


def unschedulable(name: str = "digits-v2-a") -> dict[str, Any]:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: 3 no nvidia.com/gpu",
    }
    return {"metadata": {"name": name}, "status": {"phase": "Pending", "conditions": [condition]}}


@pytest.mark.parametrize(
    ("found", "reason", "words"),
    [
        pytest.param(pod(), None, "", id="all is well"),
        pytest.param({"metadata": {"name": "a"}}, None, "", id="nothing is known yet"),
        pytest.param(pod(unready(), unready()), None, "", id="it starts"),
        pytest.param(pod(golden=unready()), None, "", id="Triton is ready and the golden check still runs"),
        pytest.param(
            pod(unready(state={"waiting": {"reason": "ContainerCreating"}}), unready()), None, "", id="its containers are made"
        ),
        # --- wrong answers ---
        pytest.param(
            pod(golden=unready(state={"terminated": {"exitCode": 3, "message": MISMATCH}})),
            "GoldenMismatch",
            "digits version 2 differs: 3.1 > 0.001",
            id="the answers differ",
        ),
        pytest.param(
            pod(golden=unready(state=BACKING_OFF, lastState={"terminated": {"exitCode": 3, "message": MISMATCH}})),
            "GoldenMismatch",
            "3.1 > 0.001",
            id="the answers differed and the check waits for its next turn",
        ),
        pytest.param(
            pod(golden=unready(restartCount=1, lastState={"terminated": {"exitCode": 3, "message": MISMATCH}})),
            "GoldenMismatch",
            "3.1 > 0.001",
            id="the answers differed and the check runs again",
        ),
        pytest.param(
            pod(golden={"restartCount": 1, "lastState": {"terminated": {"exitCode": 3, "message": MISMATCH}}}),
            None,
            "",
            id="the answers differed and now agree",
        ),
        pytest.param(
            pod(golden=unready(state={"terminated": {"exitCode": 3, "message": TOLD}})),
            None,
            "",
            id="the check could not read the artefact, which the progress deadline ends",
        ),
        pytest.param(
            pod(triton=unready(state={"terminated": {"exitCode": 3, "message": MISMATCH}})),
            None,
            "",
            id="an image of the user's own speaks in the check's words",
        ),
        # --- memory ---
        pytest.param(
            pod(unready(state={"terminated": KILLED_FOR_MEMORY})),
            "OutOfMemory",
            "runtime.resources.limits.memory",
            id="memory ran out",
        ),
        pytest.param(
            pod(unready(restartCount=1, lastState={"terminated": KILLED_FOR_MEMORY})),
            "OutOfMemory",
            "raise",
            id="memory ran out and Triton loads again",
        ),
        pytest.param(
            pod(unready(restartCount=7, state=BACKING_OFF, lastState={"terminated": KILLED_FOR_MEMORY})),
            "OutOfMemory",
            "raise",
            id="memory runs out again and again, which is more than a crash loop says",
        ),
        pytest.param(
            pod({"restartCount": 3, "lastState": {"terminated": KILLED_FOR_MEMORY}}),
            None,
            "",
            id="memory ran out and the pod is over it",
        ),
        pytest.param(
            pod(unready(restartCount=1, lastState={"terminated": KILLED_FOR_MEMORY}), unready_since=LATER),
            "NotReady",
            LATER,
            id="memory ran out once, it was ready again, and is not",
        ),
        # --- crashes ---
        pytest.param(pod(unready(state={"terminated": SHORT})), None, "", id="one crash is none"),
        pytest.param(
            pod(unready(restartCount=1, lastState={"terminated": SHORT})), None, "", id="one crash and Triton loads again"
        ),
        pytest.param(
            pod(unready(restartCount=1, state=BACKING_OFF, lastState={"terminated": SHORT})),
            "CrashLoop",
            "triton crashes again and again, last with code 134: abort: no kernel image",
            id="the kubelet backs off",
        ),
        pytest.param(
            pod(unready(restartCount=3, state=BACKING_OFF)),
            "CrashLoop",
            "again and again",
            id="a crash of which nothing is known",
        ),
        pytest.param(
            pod(unready(restartCount=2, lastState={"terminated": SHORT})),
            "CrashLoop",
            "code 134",
            id="the third start within minutes",
        ),
        pytest.param(
            pod(unready(restartCount=2, lastState={"terminated": LONG})), None, "", id="the third start, after a run of hours"
        ),
        pytest.param(pod({"restartCount": 9, "lastState": {"terminated": SHORT}}), None, "", id="many restarts and ready now"),
        # --- what only keeps from work ---
        pytest.param(unschedulable(), "Unschedulable", "0/3 nodes: 3 no nvidia.com/gpu", id="no node has room"),
        pytest.param(
            pod(unready(), unready_since=LATER),
            "NotReady",
            f"not ready since {LATER}: containers with unready status",
            id="it was ready and is not",
        ),
        pytest.param(
            pod(unready(restartCount=1, lastState={"terminated": SHORT}), unready_since=LATER),
            "NotReady",
            LATER,
            id="it had a crash, was ready again, and is not",
        ),
        pytest.param(pod(unready_since=LATER), None, "", id="its containers are ready, the node is not"),
    ],
)
def test_what_speaks_against_a_version(found: dict[str, Any], reason: str | None, words: str) -> None:
    trouble = pod_trouble(found)
    assert (trouble.reason if trouble else None) == reason
    if trouble:
        assert trouble.message.startswith("pod digits-v2-a: ")
        assert words in trouble.message


LABELS = {"serving.perch.dev/component": "triton", "serving.perch.dev/version": "2"}


def deployment(content: str | None = "h2") -> dict[str, Any]:
    template = {"metadata": {"annotations": {"serving.perch.dev/serving-hash": content}} if content else {}}
    metadata = {"name": "digits-v2", "labels": LABELS, "resourceVersion": "7"}
    return {"metadata": metadata, "spec": {"replicas": 2, "template": template}}


def of_version(found: dict[str, Any], content: str | None = "h2", **more: Any) -> dict[str, Any]:
    annotations = {"annotations": {"serving.perch.dev/serving-hash": content}} if content else {}
    return {**found, "metadata": {**found["metadata"], "labels": LABELS, **annotations, **more}}


CRASHES = pod(unready(restartCount=5, state=BACKING_OFF, lastState={"terminated": SHORT}))
DIFFERS = pod(golden=unready(state={"terminated": {"exitCode": 3, "message": MISMATCH}}))


@pytest.mark.parametrize(
    ("pods", "content", "reason"),
    [
        pytest.param([], "h2", None, id="no pods"),
        pytest.param([of_version(unschedulable()), of_version(CRASHES)], "h2", "CrashLoop", id="a crash before a lack of room"),
        pytest.param([of_version(CRASHES), of_version(DIFFERS)], "h2", "GoldenMismatch", id="wrong answers before a crash"),
        pytest.param([of_version(CRASHES, "h1")], "h2", None, id="a crash of the template that is being replaced"),
        pytest.param([of_version(CRASHES, None)], "h2", None, id="a crash of a template that a former release rendered"),
        pytest.param(
            [of_version(CRASHES, None)], None, "CrashLoop", id="a template that a former release rendered and still stands"
        ),
        pytest.param(
            [of_version(CRASHES, deletionTimestamp="2026-01-01T12:00:00Z")], "h2", None, id="a crash of a pod that is going"
        ),
        pytest.param(
            [of_version({**CRASHES, "status": {**CRASHES["status"], "phase": "Failed"}})],
            "h2",
            None,
            id="an evicted pod's last state",
        ),
        pytest.param(
            [
                of_version(CRASHES)
                | {"metadata": {**of_version(CRASHES)["metadata"], "labels": {**LABELS, "serving.perch.dev/version": "1"}}}
            ],
            "h2",
            None,
            id="a crash of another version",
        ),
    ],
)
def test_a_versions_trouble_is_the_most_serious_of_its_present_pods(
    pods: list[dict[str, Any]], content: str | None, reason: str | None
) -> None:
    facts = serving_facts(deployment(content), pods)
    trouble = facts.trouble
    assert facts.resource_version == "7"
    assert (trouble.reason if trouble else None) == reason


def test_the_trouble_of_many_pods_is_told_the_same_whatever_their_order() -> None:
    pods = [of_version(unschedulable(name)) for name in ("digits-v2-c", "digits-v2-a", "digits-v2-b")]
    told = {serving_facts(deployment(), order).troubles for order in (pods, pods[::-1])}
    words = [f"pod digits-v2-{pod}: 0/3 nodes: 3 no nvidia.com/gpu" for pod in "abc"]
    assert told == {tuple(PodTrouble("Unschedulable", each) for each in words)}


def test_every_kind_of_child_is_seen_and_those_of_a_former_owner_are_not() -> None:
    cache = Cache(None, (), lambda _: None, lambda: NOON)  # type: ignore[arg-type]
    for uid, name in (("uid-1", "digits-v1"), ("uid-0", "digits-v7")):
        labels = {"serving.perch.dev/model-deployment": "digits", "serving.perch.dev/version": "1"}
        meta = {"name": name, "namespace": "vision", "labels": labels, "ownerReferences": [{"uid": uid, "controller": True}]}
        for kind in ("Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"):
            cache.absorb({"kind": kind, "metadata": meta, "spec": {"of": kind}})
    seen = observe(cache, ("vision", "digits"), "uid-1")
    assert dict(seen.services) == {"digits-v1": {"of": "Service"}}
    assert dict(seen.budgets) == {"digits-v1": {"of": "PodDisruptionBudget"}}
    assert dict(seen.autoscalers) == {"digits-v1": {"of": "HorizontalPodAutoscaler"}}
    assert dict(seen.policies) == {"digits-v1": {"of": "NetworkPolicy"}}


def test_what_the_server_or_others_add_is_no_drift_and_what_they_change_is() -> None:
    wanted = {"ports": [{"name": "http", "port": 8000}], "selector": {"a": "b"}}
    assert matches(
        wanted, {"ports": [{"name": "http", "port": 8000, "nodePort": 0}], "selector": {"a": "b"}, "clusterIP": "10.0.0.1"}
    )
    assert not matches(wanted, {"ports": [{"name": "http", "port": 8001}], "selector": {"a": "b"}})
    assert not matches(wanted, {"ports": [], "selector": {"a": "b"}})
    assert not matches(wanted, None)


async def test_a_key_woken_during_its_own_pass_gets_another_one_and_never_two_at_once() -> None:
    queue, key = Queue(), ("vision", "digits")
    queue.add(key)
    queue.add(key)
    assert await queue.take() == key
    queue.add(key)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.05)
    queue.done(key)
    assert await asyncio.wait_for(queue.take(), 1) == key
    queue.done(key)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.05)


async def test_a_later_deadline_replaces_the_former_one() -> None:
    queue, key = Queue(), ("vision", "digits")
    task = asyncio.create_task(queue.run_deadlines())
    queue.add_after(key, 0.1)
    queue.add_after(key, 30)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.4)
    queue.add_after(key, 0.05)
    assert await asyncio.wait_for(queue.take(), 1) == key
    task.cancel()


class Server:
    """Stands in for `Kube`: holds what it is told to, refuses what it is told to. Leaves out everything else of an API server."""

    def __init__(self) -> None:
        self.refuse: dict[str, ApiError] = {}
        self.foreign: set[str] = set()
        self.calls: list[str] = []

    async def get(self, _: Any, __: str, name: str) -> dict[str, Any]:
        if name not in self.foreign:
            raise ApiError(404, "NotFound", f"{name} not found")
        return {"metadata": {"name": name, "labels": {"app": "somebody-elses"}}}

    async def apply(self, body: dict[str, Any], resource_version: str | None = None) -> dict[str, Any]:
        self.calls.append(f"apply {body['kind']}")
        if body["kind"] in self.refuse:
            raise self.refuse[body["kind"]]
        labels = {"serving.perch.dev/model-deployment": "digits"}
        return {**body, "metadata": {**body["metadata"], "labels": labels, "resourceVersion": "2", "uid": "u"}}

    async def delete(self, kind: Any, _: str, name: str, known: dict[str, Any] | None) -> None:
        self.calls.append(f"delete {kind.kind} {name} {known['metadata']['uid'] if known else None}")


def body(kind: str, name: str = "digits") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "vision"}}


async def test_one_refusal_keeps_no_other_write_from_being_made_and_is_told() -> None:
    server = Server()
    server.refuse["Job"] = ApiError(500, "InternalError", "failed calling webhook")
    cache = Cache(server, (), lambda _: None, lambda: NOON)  # type: ignore[arg-type]
    outcome = await execute(server, cache, IDENTITY, [Apply(body("Job")), Apply(body("HTTPRoute"))])  # type: ignore[arg-type]
    assert server.calls == ["apply Job", "apply HTTPRoute"]
    assert outcome.refused == ["apply Job digits: failed calling webhook"]
    assert not outcome.stale


async def test_a_conflict_is_no_refusal_but_a_reason_to_look_again() -> None:
    server = Server()
    server.refuse["HTTPRoute"] = ApiError(409, "Conflict", "the object has been modified")
    cache = Cache(server, (), lambda _: None, lambda: NOON)  # type: ignore[arg-type]
    outcome = await execute(server, cache, IDENTITY, [Apply(body("HTTPRoute"), "1")])  # type: ignore[arg-type]
    assert outcome.stale
    assert outcome.refused == []


async def test_somebody_elses_object_is_not_taken_over() -> None:
    server = Server()
    server.foreign.add("digits-v1")
    cache = Cache(server, (), lambda _: None, lambda: NOON)  # type: ignore[arg-type]
    outcome = await execute(server, cache, IDENTITY, [Apply(body("Service", "digits-v1"))])  # type: ignore[arg-type]
    assert server.calls == []
    assert "is not Perch's" in outcome.refused[0]


async def test_a_delete_names_the_very_object_that_was_seen() -> None:
    server = Server()
    cache = Cache(server, (), lambda _: None, lambda: NOON)  # type: ignore[arg-type]
    labels = {"serving.perch.dev/model-deployment": "digits"}
    cache.absorb(
        {
            "kind": "Deployment",
            "metadata": {"name": "digits-v1", "namespace": "vision", "labels": labels, "uid": "u7", "resourceVersion": "9"},
        }
    )
    await execute(server, cache, IDENTITY, [Delete("Deployment", "digits-v1")])  # type: ignore[arg-type]
    assert server.calls == ["delete Deployment digits-v1 u7"]
    assert cache.children(DEPLOYMENT, ("vision", "digits")) == {}
