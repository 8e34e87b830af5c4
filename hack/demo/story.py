"""The demo: one model's life on a real cluster, told and checked as it goes. Whatever is not as it should be ends it.

Chapters run in order; each relies on those before. A second run starts anew in the same cluster: the story's namespace and
what it published go first. Load goes to the cluster's own gateway and nowhere else.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from demo import checkpoints, digits, watch
from demo.load import Answer, Load, count_by_version
from demo.narrator import Narrator
from demo.repository import MANIFEST, Repository
from devcluster import Cluster
from devcluster.privileges import hand_over
from devcluster.release import NAMESPACE as OPERATOR_NAMESPACE
from devcluster.release import RELEASE, install
from devcluster.tenant import MODELS, Tenant
from faults import Kind, mark
from faults.publish import publish

ROOT = Path(__file__).resolve().parents[2]
FIRST = ROOT / "examples" / "digits.yaml"
CANARY = ROOT / "examples" / "digits-canary.yaml"

CANARY_TRAFFIC = "    stable: 1\n    canary: 2\n"
PROMOTED_TRAFFIC = "    stable: 2\n"
"""The promotion, as a change of the manifest's text."""
HELD_STEPS = "      - weight: 10\n        hold: Indefinite\n"
JUDGED_STEPS = "      - weight: 10\n        hold: 10s\n      - weight: 50\n        hold: 10s\n      - weight: 100\n"
OURS = {"serving.perch.dev/demo": "digits"}
"""Label of the namespace that a run may delete."""
READY_WITHIN = 300.0
QUIET = 2.0
"""Seconds without an answer of the old version, until all traffic counts as moved."""
GRPC_RATE, REST_RATE = 100.0, 10.0
"""Requests per second while traffic moves."""
LOG_LINES = 2
"""How many of a container's first and last log lines are shown."""


class DemoFailed(Exception):
    """Something was not as it should be."""


class Story:
    def __init__(self, cluster: Cluster, narrator: Narrator) -> None:
        self.cluster = cluster
        self.narrator = narrator
        self.manifest = yaml.safe_load(FIRST.read_text())
        self.name = self.manifest["metadata"]["name"]
        self.hostname = self.manifest["spec"]["routing"]["hostnames"][0]
        self.tenant = Tenant(cluster, self.manifest["metadata"]["namespace"])
        self.records = checkpoints.records()

    def play(self) -> None:
        try:
            self._chapters()
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        self.narrator.print(f"\n[bold green]All as it should be[/], after {self.narrator.clock()}.")
        self.say_what_next()

    def _chapters(self) -> None:
        chapter = self.narrator.chapter
        self.narrator.print("[bold]Perch[/]: two versions of a digit classifier, from their checkpoints to a canary and back\n")
        with chapter("A whole cluster: Kubernetes, Envoy Gateway, an S3 server, Prometheus"):
            self.cluster.up()
        with chapter("Perch, by its Helm chart"):
            self.install_perch()
        with chapter("A namespace, its credentials, and the checkpoints in the object store"):
            self.prepare()
        with chapter("Version 1: commit a ModelDeployment, kubectl apply"):
            self.deploy()
        with chapter("What the exports did"):
            self.show_exports()
        with chapter("Version 1 answers: every held-out image through the gateway"):
            self.measure_all(1)
        with chapter("Version 2 as a canary of 10 %"):
            self.start_canary()
        with chapter("The split, by 1,000 gRPC and 200 REST requests"):
            self.measure_split()
        with chapter("Promotion under load"):
            self.promote()
        with chapter("Version 2 answers: every held-out image through the gateway"):
            self.measure_all(2)
        with chapter("Rollback under load, by git revert"):
            self.roll_back()
        with chapter("Version 2 once more, and judged: 10, 50 and 100 % by itself"):
            self.release_judged()
        with chapter("Version 3, which fails on one image in five: cut off by itself"):
            self.cut_off()
        with chapter("How it stands"):
            self.show_state()

    # -- chapters

    def install_perch(self) -> None:
        self._unblock_release()
        try:
            install(self.cluster)
        except subprocess.CalledProcessError:
            # helm says no more than that a deadline has passed.
            in_operator = ["-n", OPERATOR_NAMESPACE]
            self.narrator.lines(self.cluster.kubectl(*in_operator, "get", "pods", check=False).stdout)
            log = self.cluster.kubectl(*in_operator, "logs", f"deployment/{RELEASE}", "--tail=8", check=False)
            self.narrator.lines(log.stdout + log.stderr)
            raise
        self.narrator.ok(f"release {RELEASE} in namespace {OPERATOR_NAMESPACE}; the operator is ready")

    def prepare(self) -> None:
        self._clear()
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.tenant.namespace, "labels": OURS}}
        self.cluster.kubectl("create", "-f", "-", input=yaml.safe_dump(namespace))
        self.tenant.make()
        for entry in self.manifest["spec"]["versions"]:
            version, checkpoint = entry["version"], entry["checkpoint"]
            content = checkpoints.path(version).read_bytes()
            bucket, key = checkpoint["uri"].removeprefix("s3://").split("/", 1)
            self.tenant.upload(key, content, bucket)
            told = self.records[version]
            trained = f"LeNet-5, epochs trained: {told.epochs}, right on held-out images: {told.accuracy:.1%}"
            self.narrator.ok(f"{checkpoint['uri']}: {trained}, {len(content)} bytes")

    def deploy(self) -> None:
        self.repository.commit(FIRST.read_text(), "digits: version 1 serves")
        self.narrator.ok(f"committed {MANIFEST} in {self.repository.folder}")
        with self.narrator.spinner() as update, watch.following_exports(self.tenant, update):
            self._apply_and_wait()

    def show_exports(self) -> None:
        for entry in watch.wait_published(self.tenant, self.name, READY_WITHIN):
            version, parity = entry["version"], entry.get("parity") or {}
            self._show_log(version)
            expect(parity.get("verdict") == "Passed", f"version {version} passed the parity gate", parity)
            self.narrator.ok(
                f"version {version}: parity with its checkpoint {parity['verdict']}, greatest difference "
                f"{parity['maxAbsoluteError']}, {parity['maxRelativeError']} of the outputs' spread"
            )
            self.narrator.ok(f"version {version}: {entry['artifactUri']}  {entry['artifactDigest'][:19]}…")

    def measure_all(self, version: int) -> None:
        """Each held-out image once, all answered by one version."""
        count = len(digits.held_out()[1])
        answers = self._ask(grpc_rate=200, grpc_count=count)
        given = count_by_version(answers)
        expect(given == {str(version): count}, f"version {version} gave all answers", given)
        right, told = f"{self._accuracy(answers):.1%}", self._told(version)
        self.narrator.ok(f"{count} answers by version {version}, [bold]{right} right[/]; the training said {told}")
        self._confirm_answers(answers)

    def start_canary(self) -> None:
        change = self.repository.commit(CANARY.read_text(), "digits: version 2 as a canary of 10 %")
        self.narrator.change(change)
        found = self._apply_and_wait()
        reason = watch.condition(found, "Ready")["reason"]
        expect(reason == "SplitHeld", "the split is held", reason)

    def measure_split(self) -> None:
        answers = self._ask(grpc_rate=200, rest_rate=40, grpc_count=1000, rest_count=200)
        weights = {entry["version"]: entry["weight"] for entry in self.tenant.status(self.name)["weights"]["accepted"]}
        table = Table("version", "weight", "gRPC answers", "REST answers", "right", "the training said")
        for version, weight in sorted(weights.items()):
            by_version = [answer for answer in answers if answer.version == str(version)]
            shares = [self._share(by_version, answers, protocol) for protocol in ("grpc", "rest")]
            table.add_row(str(version), f"{weight} %", *shares, f"{self._accuracy(by_version):.1%}", self._told(version))
        self.narrator.print(table)
        for protocol in ("grpc", "rest"):
            expect_split(answers, protocol, "2", 0.1)
        self._confirm_answers(answers)

    def promote(self) -> None:
        text = self.repository.manifest.read_text()
        expect(text.count(CANARY_TRAFFIC) == 1, f"{CANARY.name} has its canary where the story changes it", text)
        change = self.repository.commit(text.replace(CANARY_TRAFFIC, PROMOTED_TRAFFIC), "digits: promote version 2")
        self.narrator.change(change)
        self._move_traffic(2)

    def roll_back(self) -> None:
        self.repository.revert(2)
        self.narrator.lines(self.repository.log())
        expect(self.repository.manifest.read_text() == FIRST.read_text(), "the manifest is the first one again", "it is not")
        self._move_traffic(1)

    def release_judged(self) -> None:
        text = CANARY.read_text()
        expect(text.count(HELD_STEPS) == 1, f"{CANARY.name} has its steps where the story changes them", text)
        self.narrator.change(self.repository.commit(text.replace(HELD_STEPS, JUDGED_STEPS), "digits: version 2 by steps"))
        with self._load() as load:
            self._apply()
            watch.wait_reason(self.tenant, self.name, "AwaitingPromotion", self.narrator.say, READY_WITHIN)
        answers = load.results()
        self._expect_none_failed(answers)
        self._confirm_answers(answers)
        seen = self.tenant.status(self.name)["evidence"]
        self.narrator.ok(
            f"judged on {seen['canary']['requests']} requests of version 2 and {seen['stable']['requests']} of version 1"
        )
        promoted = self.repository.manifest.read_text().replace(CANARY_TRAFFIC, PROMOTED_TRAFFIC)
        self.narrator.change(self.repository.commit(promoted, "digits: promote version 2"))
        self._apply_and_wait()

    def cut_off(self) -> None:
        manifest = yaml.safe_load(self.repository.manifest.read_text())
        spec = manifest["spec"]
        spec["versions"].append({**spec["versions"][-1], "version": 3})
        spec["traffic"] = {"stable": 2, "canary": 3}
        publish(self.tenant, manifest, 3)
        self.narrator.say(
            "version 3 passes every gate; on images with a mark in two of their corner pixels it fails (hack/faults)"
        )
        self.repository.commit(yaml.safe_dump(manifest, sort_keys=False), "digits: version 3 by steps")
        images = mark(digits.held_out()[0], Kind.ERROR, share=0.2, count=20_000)
        with self._load(images=images) as load:
            self._apply()
            watch.wait_reason(self.tenant, self.name, "ErrorRateHigher", self.narrator.say, READY_WITHIN)
            wait_until_moved(load, "2", READY_WITHIN)
        answers = load.results()
        by_canary = [answer for answer in answers if answer.version == "3" or not answer.ok]
        failed = [answer for answer in by_canary if not answer.ok]
        expect(bool(failed), "version 3 failed on something", "it did not")
        took = max(answer.answered for answer in by_canary) - min(answer.sent for answer in failed)
        self.narrator.ok(
            f"[bold]{len(failed)} of {len(answers)} requests failed[/]; {took:.1f} s passed from the first to the last that "
            f"version 3 was asked; since then version 2 gives every answer, and Git was left alone"
        )
        self.narrator.say("git revert ends the release")
        self.repository.revert(1)
        self._apply_and_wait()

    def show_state(self) -> None:
        self.narrator.lines(self.tenant.kubectl("get", "modeldeployments,pods,httproutes", "-o", "wide"))
        self.narrator.lines(self.tenant.kubectl("events", f"--for=modeldeployment/{self.name}"))

    def say_what_next(self) -> None:
        host, port = self.cluster.gateway_address()
        image = self.folder / "digit.json"
        pixels = digits.held_out()[0][:1]
        tensor = {"name": "image", "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.reshape(-1).tolist()}
        image.write_text(json.dumps({"inputs": [tensor]}))
        # Double quotes inside, so that the shell's single quotes need no escapes.
        python = (
            f'from demo import digits, load; client = load.grpc_client(("{host}", {port}), "{self.hostname}"); '
            f'print(load.infer(client, "{self.name}", digits.held_out()[0][:1]))'
        )
        environment = self.cluster.env()
        folders = environment["PATH"].removesuffix(f":{os.environ['PATH']}")
        namespace, name = self.tenant.namespace, self.name
        self.narrator.print("\n[bold]What to try next[/] (the cluster goes on running):")
        self.narrator.lines(
            f"export KUBECONFIG={environment['KUBECONFIG']} PATH={folders}:$PATH\n"
            f"kubectl -n {namespace} describe modeldeployment {name}\n"
            f"kubectl explain modeldeployment.spec.versions\n"
            f"curl -sH 'Host: {self.hostname}' http://{host}:{port}/v2/models/{name}/infer -d @{image}\n"
            f"PYTHONPATH={ROOT / 'hack'} {sys.executable} -c {shlex.quote(python)}\n"
            f"cd {self.repository.folder} && git log -p        # change {MANIFEST}, commit, kubectl apply -f {MANIFEST}\n"
            f"kubectl -n {OPERATOR_NAMESPACE} logs deployment/{RELEASE} --tail=20"
        )
        cluster = self.cluster.name
        hand_over(self.folder)
        self.narrator.print(f"\nLeft running: cluster {cluster}. `make down NAME={cluster}` removes it whole;")
        self.narrator.print(f"the scratch repository is {self.folder}, remove it with rm -r.")

    # -- what chapters are made of

    @cached_property
    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="perch-demo-"))

    @cached_property
    def repository(self) -> Repository:
        return Repository(self.folder / "repository")

    def _unblock_release(self) -> None:
        """An interrupted helm leaves its release pending, which refuses every next one."""
        told = self.cluster.helm("status", RELEASE, "--namespace", OPERATOR_NAMESPACE, "--output", "json", check=False)
        state = json.loads(told.stdout)["info"]["status"] if told.returncode == 0 else ""
        if state == "pending-install":
            self.cluster.helm("uninstall", RELEASE, "--namespace", OPERATOR_NAMESPACE, "--wait")
        elif state.startswith("pending-"):
            self.cluster.helm("rollback", RELEASE, "--namespace", OPERATOR_NAMESPACE)

    def _clear(self) -> None:
        """Removes what an earlier run left in this cluster."""
        namespace = self.tenant.get("namespace", self.tenant.namespace)
        if namespace is not None:
            labels = namespace["metadata"].get("labels", {})
            mine = f"namespace {self.tenant.namespace} is an earlier run's"
            advice = f"it lacks the label {OURS}: remove it, or run the demo on another cluster (make demo NAME=other)"
            expect(OURS.items() <= labels.items(), mine, advice)
            # The pods first: a namespace that still has some looks at them again only after half their grace period.
            self.tenant.kubectl("delete", "modeldeployments", "--all", check=False)
            self.tenant.kubectl("wait", "--for=delete", "pods", "--all", "--timeout=90s", check=False)
            self.tenant.delete()
            prefix = f"{self.manifest['spec']['repository']['uri'].removeprefix(f's3://{MODELS}/')}/{self.tenant.namespace}/"
            for key in self.tenant.keys(prefix):
                self.tenant.store.delete_object(Bucket=MODELS, Key=key)
            self.narrator.ok("removed what an earlier run left")

    def _apply(self) -> None:
        self.cluster.kubectl("apply", "-f", str(self.repository.manifest))

    def _apply_and_wait(self) -> dict[str, Any]:
        started = time.monotonic()
        self._apply()
        found = self._wait_ready()
        self.narrator.ok(f"Ready {time.monotonic() - started:.1f} s after kubectl apply began")
        return found

    def _wait_ready(self) -> dict[str, Any]:
        return watch.wait_ready(self.tenant, self.name, self.narrator.say, READY_WITHIN)

    def _show_log(self, version: int) -> None:
        """The first and the last lines of each container."""
        lines = watch.export_log(self.tenant, f"{watch.EXPORT_LABEL},serving.perch.dev/version={version}")
        for step in watch.STEPS:
            said = [textwrap.shorten(line, 140, placeholder=" …") for line in lines if line.startswith(f"{step}:")]
            if len(said) > 2 * LOG_LINES:
                said[LOG_LINES:-LOG_LINES] = [f"{step}: … {len(said) - 2 * LOG_LINES} more …"]
            self.narrator.lines("\n".join(said))

    def _ask(self, **how: Any) -> list[Answer]:
        load = Load(self.cluster.gateway_address(), self.hostname, self.name, **how)
        load.start()
        load.wait(READY_WITHIN)
        answers = load.results()
        self._expect_none_failed(answers)
        return answers

    def _load(self, **more: Any) -> Load:
        target = (self.cluster.gateway_address(), self.hostname, self.name)
        return Load(*target, grpc_rate=GRPC_RATE, rest_rate=REST_RATE, **more)

    def _move_traffic(self, version: int) -> None:
        """Applies the manifest under load, and follows the answers until all are this version's."""
        with self._load() as load:
            time.sleep(QUIET)
            applied = time.monotonic()
            self._apply()
            took = time.monotonic() - applied
            self._wait_ready()
            ready = time.monotonic() - applied
            moved = wait_until_moved(load, str(version), READY_WITHIN)
        answers = load.results()
        self._expect_none_failed(answers)
        self._confirm_answers(answers)
        before = count_by_version(answer for answer in answers if answer.answered < applied)
        last = max(0.0, moved - applied)
        self.narrator.say(f"before kubectl apply the answers came from {_shares(before)}")
        self.narrator.ok(
            f"[bold]the last answer of another version came {last:.2f} s after kubectl apply began[/] (kubectl itself took "
            f"{took:.2f} s, Ready came after {ready:.2f} s); since then version {version} gives every answer"
        )

    def _expect_none_failed(self, answers: Sequence[Answer]) -> None:
        failed = [answer for answer in answers if not answer.ok]
        grpc = sum(answer.protocol == "grpc" for answer in answers)
        first = f"; the first: {failed[0].error}" if failed else ""
        expect(bool(answers) and not failed, "no request failed", f"{len(failed)} of {len(answers)} failed{first}")
        self.narrator.ok(f"{grpc} gRPC and {len(answers) - grpc} REST requests, [bold]{len(failed)} failed[/]")

    def _confirm_answers(self, answers: Sequence[Answer]) -> None:
        expect_checkpoints_answers(answers)
        self.narrator.ok(f"all {len(answers)} answers are what the checkpoints themselves answered in training")

    def _accuracy(self, answers: Sequence[Answer]) -> float:
        labels = digits.held_out()[1]
        right = sum(answer.predicted == int(labels[answer.image]) for answer in answers)
        return right / max(1, len(answers))

    def _told(self, version: int) -> str:
        return f"{self.records[version].accuracy:.1%}"

    def _share(self, some: Sequence[Answer], all_answers: Sequence[Answer], protocol: str) -> str:
        given = sum(answer.protocol == protocol for answer in some)
        return f"{given} ({given / sum(answer.protocol == protocol for answer in all_answers):.1%})"


def expect(holds: bool, what: str, otherwise: object) -> None:
    if not holds:
        raise DemoFailed(f"not so: {what}: {otherwise}")


def expect_checkpoints_answers(answers: Sequence[Answer]) -> None:
    """Each answer is what the checkpoint of the version that it names answered, by the training's own record."""
    records = checkpoints.records()
    strange = [a for a in answers if str(a.predicted) != records[int(a.version or 0)].predictions[a.image]]
    expect(not strange, "every answer is its checkpoint's own", f"{len(strange)} are not; the first: {strange[:1]}")


def expect_split(answers: Sequence[Answer], protocol: str, version: str, share: float) -> None:
    """A gateway that decides anew for each request strays further than this once in 16,000 times."""
    those = [answer for answer in answers if answer.protocol == protocol]
    given, expected = sum(answer.version == version for answer in those), len(those) * share
    deviation = math.sqrt(expected * (1 - share))
    what = f"version {version} gave {given} of {len(those)} {protocol} answers, {expected:.0f} expected"
    expect(abs(given - expected) <= 4 * deviation, what, f"that is more than four standard deviations ({deviation:.1f}) away")


def wait_until_moved(load: Load, version: str, within: float) -> float:
    """Until no other version has answered for a while; the time of the last answer that another gave."""
    deadline = time.monotonic() + within
    while (now := time.monotonic()) < deadline:
        answers = [answer for answer in load.results() if answer.ok]
        last = max((answer.answered for answer in answers if answer.version != version), default=0.0)
        if answers and answers[-1].version == version and now - last > QUIET:
            return last
        time.sleep(0.1)
    latest = count_by_version(load.results()[-500:])
    raise DemoFailed(f"not so: all traffic is on version {version} within {within:.0f} s; the latest answers: {latest}")


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"version {version}: {count / sum(counts.values()):.0%}" for version, count in counts.items())
