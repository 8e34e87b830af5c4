"""Images per second through Triton, on a cluster, against PyTorch eager: `python -m bench.served [--cluster NAME] [network…]`.

Each precision of each network is exported and served, then Triton and eager work in turn, never together, on the same cores: so
a machine which others use too slows both alike. Batches of 8 on either side; Triton is asked by gRPC, two requests in flight, so
that it computes one while the other travels. Weights are random: speed does not depend on them.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

BATCH, THREADS, ROUNDS = 8, 2, 5
SECONDS = 10.0
SHAPE = (3, 224, 224)
NETWORKS = ("resnet50",)


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="of torchvision")] = None,
    cluster: Annotated[str, typer.Option(help="the cluster's name")] = "bench",
    keep: bool = False,
) -> None:
    from devcluster import Cluster
    from devcluster.release import install

    native = Cluster(cluster, gpus=0)
    native.up()
    try:
        install(native)
        measure_all(native, networks or NETWORKS)
    finally:
        if not keep:
            native.down()


def measure_all(cluster: Any, networks: Sequence[str] = NETWORKS) -> None:
    from devcluster.tenant import Tenant

    run = f"served-{uuid.uuid4().hex[:6]}"
    tenant = Tenant(cluster, run).make()
    print(
        f"batches of {BATCH}, {ROUNDS} rounds of {SECONDS:.0f} s; load average at the start {os.getloadavg()[0]:.1f}", flush=True
    )
    for network in networks:
        for precision in ("FP32", "FP16", "INT8"):
            measure(tenant, network, precision, run)
    tenant.delete()


def measure(tenant: Any, network: str, precision: str, prefix: str) -> None:
    from devcluster import images
    from exports.cases import UNTRAINED, Case
    from exports.play import served

    case = Case(
        f"{network} {precision}", f"torchvision:{network}", precision=precision, more=UNTRAINED if precision == "INT8" else {}
    )
    python = images.exporter_python(Path(sysconfig.get_paths()["purelib"]))
    with served(tenant, case, prefix) as ready:
        command = list(map(str, [*python, Path(__file__).resolve(), network]))
        environment = {**os.environ, "HOME": "/tmp"}
        eager = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert eager.stdin is not None
        assert eager.stdout is not None
        rates = []
        for _ in range(ROUNDS):
            ours = through_triton(ready.address, case.slug)
            eager.stdin.write("\n")
            eager.stdin.flush()
            rates.append((ours, float(eager.stdout.readline())))
        eager.stdin.close()
        eager.wait()
    ratios = [ours / theirs for ours, theirs in rates]
    triton, torch = (statistics.median(pair[place] for pair in rates) for place in (0, 1))
    print(
        f"{network}: {precision} {triton:.1f} images/s through Triton, eager {torch:.1f}: "
        f"{statistics.median(ratios):.2f} times ({min(ratios):.2f}-{max(ratios):.2f})",
        flush=True,
    )


def through_triton(address: str, model: str) -> float:
    import numpy as np
    import tritonclient.grpc as triton

    images = np.random.default_rng(0).standard_normal((BATCH, *SHAPE)).astype(np.float32)
    answered: list[float] = []
    started = time.monotonic()

    def work() -> None:
        with triton.InferenceServerClient(f"{address}:8001") as client:
            while time.monotonic() < started + SECONDS:
                tensor = triton.InferInput("image", list(images.shape), "FP32").set_data_from_numpy(images)
                client.infer(model, [tensor], client_timeout=60)
                answered.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return BATCH * len(answered) / (max(answered) - started)


def eager(network: str) -> None:
    """A rate for each line of stdin."""
    import torch
    import torchvision

    torch.set_num_threads(THREADS)
    model = torchvision.models.get_model(network, weights=None).eval()
    images = torch.randn(BATCH, *SHAPE)
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
        eager(sys.argv[1])
