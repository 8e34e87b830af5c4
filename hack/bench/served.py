"""Images per second through Triton, on a cluster, against PyTorch eager: `python -m bench.served [--only NETWORK]`.

Each precision of each network is exported and served, then Triton and eager work in turn, never together, on the same cores: so
a machine which others use too slows both alike. Batches of 8 on either side; Triton is asked by gRPC, two requests in flight, so
that it computes one while the other travels. Triton is the real server, and behind it stands the development image's own backend
over the onnxruntime wheel (hack/images/onnxruntime), which copies each batch once between two processes.

Weights are random but for LeNet-5's, which the demo trained: speed does not depend on them, and what INT8 costs in accuracy can
be told of trained ones alone. So LeNet-5 is calibrated on digits, and asked all held-out ones.

A cell takes a minute for its rounds beside its export and start. Rows are printed as they come, ready for docs/benchmarks.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from exports.cases import Case
    from exports.play import Served

BATCH, THREADS, ROUNDS = 8, 2, 3
SECONDS = 10.0
PRECISIONS = ("FP32", "FP16", "INT8")
TIMEOUT = 60
HEAD = """\
| network | precision | images/s through Triton | eager | ratio (least–greatest) | right on held-out images |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Network:
    name: str
    architecture: str
    shape: tuple[int, int, int] = (3, 224, 224)


NETWORKS = (
    Network("LeNet-5", "lenet5", (1, 28, 28)),
    Network("ResNet-18", "torchvision:resnet18"),
    Network("ResNet-50", "torchvision:resnet50"),
    Network("VGG-16", "torchvision:vgg16"),
    Network("Inception v3", "torchvision:inception_v3", (3, 299, 299)),
)


def main(
    only: Annotated[list[str] | None, typer.Option(help="These networks alone; may be given several times.")] = None,
    cluster: Annotated[str, typer.Option(help="The cluster's name.")] = "bench",
    keep: Annotated[bool, typer.Option(help="Leave the cluster running.")] = False,
) -> None:
    from devcluster import Cluster
    from devcluster.release import install

    names = [network.name for network in NETWORKS]
    if unknown := set(only or []) - set(names):
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    native = Cluster(cluster, gpus=0)
    native.up()
    try:
        install(native)
        measure_all(native, [network for network in NETWORKS if not only or network.name in only])
    finally:
        if not keep:
            native.down()


def measure_all(cluster: Any, networks: Sequence[Network] = NETWORKS) -> None:
    from devcluster.tenant import Tenant

    run = f"served-{uuid.uuid4().hex[:6]}"
    tenant = Tenant(cluster, run).make()
    print(f"batches of {BATCH}, {ROUNDS} rounds of {SECONDS:.0f} s; load average at the start {os.getloadavg()[0]:.1f}\n\n{HEAD}")
    for network in networks:
        with eager_of(network) as eager:
            for precision in PRECISIONS:
                print(row(tenant, network, precision, run, eager), flush=True)
    tenant.delete()


def case_of(network: Network, precision: str) -> Case:
    from exports.cases import DIGITS, Case

    if network.architecture == "lenet5":
        return Case(f"{network.name} {precision}", network.architecture, precision=precision, **DIGITS)
    # What nobody trained is far off in INT8, and as fast.
    any_answer = {"verification": {"parity": dict.fromkeys(("absoluteTolerance", "relativeTolerance"), "1")}}
    any_answer["verification"]["parity"]["minimumTop1Agreement"] = "0"
    more = any_answer if precision == "INT8" else {}
    transforms: dict[str, int | str] = {"transformInput": "false"} if network.architecture.endswith("inception_v3") else {}
    return Case(
        f"{network.name} {precision}",
        network.architecture,
        shape=network.shape,
        precision=precision,
        parameters=transforms,
        more=more,
    )


def row(tenant: Any, network: Network, precision: str, prefix: str, eager: subprocess.Popen[str]) -> str:
    from exports.play import Wrong, served

    case = case_of(network, precision)
    begin = f"| {network.name} | {precision} |"
    try:
        with served(tenant, case, prefix) as ready:
            rates = [(through_triton(ready.address, case), through_eager(eager)) for _ in range(ROUNDS)]
            right = accuracy(ready, case)
    except Wrong as error:
        return f"{begin} not served: {' '.join(str(error).split())[:300]} | | | |"
    ratios = [ours / theirs for ours, theirs in rates]
    triton, torch = (statistics.median(pair[place] for pair in rates) for place in (0, 1))
    told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"{begin} {triton:.1f} | {torch:.1f} | {told} | {right} |"


def through_triton(address: str, case: Case) -> float:
    import numpy as np
    import tritonclient.grpc as triton

    images = np.random.default_rng(0).standard_normal((BATCH, *case.shape)).astype(np.float32)
    answered: list[float] = []
    started = time.monotonic()

    def work() -> None:
        with triton.InferenceServerClient(f"{address}:8001") as client:
            while time.monotonic() < started + SECONDS:
                infer(client, case, images)
                answered.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return BATCH * len(answered) / (max(answered) - started)


def infer(client: Any, case: Case, images: Any) -> Any:
    import tritonclient.grpc as triton

    tensor = triton.InferInput("image", list(images.shape), "FP32").set_data_from_numpy(images)
    return client.infer(case.slug, [tensor], client_timeout=TIMEOUT).as_numpy("logits")


def accuracy(ready: Served, case: Case) -> str:
    """Of the network that the demo trained: what this artefact gets right of all held-out digits, beside its own checkpoint."""
    if case.weights is None:
        return "–"
    import numpy as np
    import tritonclient.grpc as triton

    from demo import checkpoints, digits

    images, labels = digits.held_out()
    with triton.InferenceServerClient(f"{ready.address}:8001") as client:
        parts = [infer(client, case, images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    right = int((np.concatenate(parts).argmax(1) == labels).sum())
    own = {str(checkpoints.path(version)): record.accuracy for version, record in checkpoints.records().items()}[case.weights]
    return f"{right / len(labels):.1%} of {len(labels)}, the checkpoint {own:.1%}"


@contextmanager
def eager_of(network: Network) -> Iterator[subprocess.Popen[str]]:
    """This file in the exporter image's environment, which has torch."""
    from devcluster import images

    python = images.exporter_python(Path(sysconfig.get_paths()["purelib"]))
    command = list(map(str, [*python, Path(__file__).resolve(), network.architecture, *network.shape]))
    environment = {**os.environ, "HOME": "/tmp"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def through_eager(eager: subprocess.Popen[str]) -> float:
    assert eager.stdin is not None
    assert eager.stdout is not None
    eager.stdin.write("\n")
    eager.stdin.flush()
    return float(eager.stdout.readline())


def answer(architecture: str, *shape: int) -> None:
    """With torch: a rate for each line of stdin."""
    import torch
    import torchvision

    from perch_exporter.architectures import LeNet5

    torch.set_num_threads(THREADS)
    if architecture == "lenet5":
        model: Any = LeNet5()
    else:
        more = {"init_weights": False} if architecture.endswith("inception_v3") else {}
        model = torchvision.models.get_model(architecture.removeprefix("torchvision:"), weights=None, **more)
    model.eval()
    images = torch.randn(BATCH, *shape)
    with torch.inference_mode():
        model(images)
        for _ in sys.stdin:
            count, started = 0, time.monotonic()
            while time.monotonic() < started + SECONDS:
                model(images)
                count += BATCH
            print(count / (time.monotonic() - started), flush=True)


if __name__ == "__main__":
    # Started twice: by hand, and by itself in the environment that has torch.
    try:
        import torch  # noqa: F401
    except ImportError:
        typer.run(main)
    else:
        answer(sys.argv[1], *map(int, sys.argv[2:]))
