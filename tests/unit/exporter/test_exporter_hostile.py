"""Hostile and broken inputs, one table: each goes through the Job's steps as the Job runs them, as processes of their own with
bounded memory, file size and time, until one refuses it. None may hang, none may take its runner along, and each ends with the
exit code and the sentence that stand here.

What needs no process of its own to be shown has tables beside its reader: pictures, data sets, sources, hand-overs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import document, packed, wheel_folder

from perch_exporter.contract import EXIT_PERMANENT, Outcome, Reason, Summary

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from perch_exporter.architectures import LeNet5  # noqa: E402

GIB = 2**30
MEMORY = 4 * GIB
"""Of private memory: torch and onnxruntime take one of it."""
SECONDS = 120
STEPS = ("fetch", "convert", "prove", "publish")


@dataclass
class Input:
    """Changes of a request, and the files that it names."""

    checkpoint: Path
    changes: dict[str, Any] = field(default_factory=dict)


Make = Callable[[Path], Input]


@dataclass(frozen=True)
class Case:
    sentence: str
    make: Make
    step: str
    reason: Reason | None
    """None: the step has no word to say any more."""
    says: str
    code: int = EXIT_PERMANENT
    file_bytes: int = 3 * GIB


@dataclass(frozen=True)
class End:
    step: str
    code: int
    summary: Summary | None


def run(made: Input, root: Path, file_bytes: int = 3 * GIB, seconds: int = SECONDS) -> End:
    """The steps one after the other, as far as they go. Raises subprocess.TimeoutExpired where one hangs."""
    settings = {
        "checkpoint__uri": made.checkpoint.as_uri(),
        "checkpoint__sha256": hashlib.sha256(made.checkpoint.read_bytes()).hexdigest(),
        "destination__uri": (root / "repository").as_uri(),
    }
    (root / "request.json").write_text(json.dumps(document(**(settings | made.changes))))
    for step in STEPS:
        message = root / f"{step}.message"
        code = run_step(step, root, message, file_bytes, seconds)
        summary = Summary.from_json(message.read_text()) if message.exists() else None
        if code != 0:
            return End(step, code, summary)
    return End(step, code, summary)


def run_step(step: str, root: Path, message: Path, file_bytes: int, seconds: int) -> int:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path for path in sys.path if path), "HOME": str(root)}
    environment["PERCH_PILLOW_WHEELS"] = str(wheel_folder(root / "wheels"))
    command = [sys.executable, "-m", "perch_exporter", step, "--request", str(root / "request.json")]
    command += ["--workspace", str(root / "work")] if step != "delete" else []
    command += ["--termination-log", str(message)]

    limits = f"ulimit -d {MEMORY // 1024}; ulimit -f {file_bytes // 512}; ulimit -c 0"
    # A shell between, as a parent that may be killed; and a session, whose processes all go with the step, as a container's do.
    with (root / f"{step}.log").open("wb") as log:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f'{limits}; "$@"; exit $?', "sh", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    return dict(LeNet5().state_dict())


def _saved(content: object, root: Path) -> Path:
    torch.save(content, root / "v1.pt")
    return root / "v1.pt"


def weights(content: Callable[[], object]) -> Make:
    return lambda root: Input(_saved(content(), root))


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/perch-hostile-ran",)


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compress: int = zipfile.ZIP_STORED) -> Path:
    """The archive with what `change` makes of each member."""
    target = path.with_suffix(".changed")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compress) as out:
        for item in source.infolist():
            out.writestr(item.filename, change(item.filename, source.read(item)))
    return target


def pickled(stream: bytes) -> Make:
    """A state dict whose pickle is these bytes."""
    return lambda root: Input(
        rezipped(_saved(_state(), root), lambda name, content: stream if name.endswith("data.pkl") else content)
    )


def bomb(form: str) -> Make:
    """Half a GiB of zeros in a few hundred KiB, in the place of the pickle or of the code's files."""
    size = GIB // (2 if form == "StateDict" else 16)

    def make(root: Path) -> Input:
        if form == "StateDict":
            path = _saved(_state(), root)
        else:
            path = root / "v1.pt"
            torch.jit.script(LeNet5().eval()).save(str(path))
        target = rezipped(
            path, lambda name, content: bytes(size) if name.endswith(("data.pkl", ".py")) else content, zipfile.ZIP_DEFLATED
        )
        return Input(target, {"checkpoint__format": form} | ({} if form == "StateDict" else {"architecture": None}))

    return make


def laughing() -> object:
    key: tuple[Any, ...] = ("ha",)
    for _ in range(6):
        key = (key,) * 10
    return {key: torch.zeros(1)}


def safetensors(header: bytes | dict[str, Any], body: bytes = bytes(64), length: int | None = None) -> Make:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def make(root: Path) -> Input:
        size = struct.pack("<Q", len(text) if length is None else length)
        (root / "v1.safetensors").write_bytes(size + text + body)
        return Input(root / "v1.safetensors", {"checkpoint__format": "SafeTensors"})

    return make


def tensor(start: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def program(change: Callable[[str, bytes], bytes]) -> Make:
    def make(root: Path) -> Input:
        example = (torch.zeros(2, 1, 28, 28),)
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.export.save(torch.export.export(LeNet5().eval(), example, dynamic_shapes=shapes), root / "v1.pt2")
        return Input(rezipped(root / "v1.pt2", change), {"checkpoint__format": "TorchExport", "architecture": None})

    return make


def garbled(name: str, content: bytes) -> bytes:
    return bytes(content[::-1]) if "weights" in name or name.endswith((".json", ".pt")) else content


def nested_json(name: str, content: bytes) -> bytes:
    return b"[" * 200_000 + b"]" * 200_000 if name.endswith("model.json") else content


# --- ONNX --------------------------------------------------------------------------------------------------------------------


def network(classes: int = 10, **parts: Any) -> onnx.ModelProto:
    """image [N, 1, 28, 28] to logits [N, classes]; `parts`: nodes in place of its own, initializers and functions beside them."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 28, 28])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
    matrix = np.random.default_rng(0).standard_normal((784, classes)).astype(np.float32)
    nodes = parts.get("nodes") or [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    initializers = [onnx.numpy_helper.from_array(matrix, "w"), *parts.get("initializers", [])]
    graph = helper.make_graph(nodes, "g", [image], [logits], initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in parts.get("opsets", [("", 18)])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=parts.get("functions", []))


def outside(*places: str) -> TensorProto:
    found = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for place in places:
        found.external_data.add(key="location", value=place)
    return found


def ready_made(model: Callable[[], onnx.ModelProto | bytes]) -> Make:
    def make(root: Path) -> Input:
        made = model()
        (root / "v1.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
        (root / "secret").write_bytes(bytes(16))
        return Input(root / "v1.onnx", {"checkpoint__format": "ONNX", "architecture": None})

    return make


def recursive() -> onnx.ModelProto:
    """A function that calls itself."""
    body = [helper.make_node("Again", ["x"], ["y"], domain="own")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    again = helper.make_function("own", "Again", ["x"], ["y"], body, opsets)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["z"]),
        helper.make_node("Again", ["z"], ["logits"], domain="own"),
    ]
    return network(nodes=nodes, functions=[again], opsets=[("", 18), ("own", 1)])


def deep() -> bytes:
    """10,000 graphs in graphs: no library of ours would write it. Numbers are those of onnx.proto's fields."""

    def part(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    graph = b""
    for _ in range(10_000):
        graph = part(1, part(5, part(6, graph)))  # its node, the node's attribute, the attribute's graph
    return part(7, graph)


def vast() -> onnx.ModelProto:
    """It asks for 4 TiB when it runs, and says so nowhere in its shapes."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["z"]),
        helper.make_node("Add", ["z", "nothing"], ["logits"]),
    ]
    return network(nodes=nodes, initializers=[onnx.numpy_helper.from_array(np.array([2**20, 2**20], np.int64), "shape")])


def claims() -> onnx.ModelProto:
    return network(initializers=[TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[2**40, 2**20])])


def unknown(domain: str) -> Callable[[], onnx.ModelProto]:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["z"]),
        helper.make_node("Steal", ["z"], ["logits"], domain=domain),
    ]
    return lambda: network(nodes=nodes, opsets=[("", 18), *([(domain, 1)] if domain else [])])


# --- the user's own code -----------------------------------------------------------------------------------------------------

NETWORK = """
import os, pathlib, signal, sys
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(784, 10)

    def forward(self, image):
        return self.last(image.flatten(1))


def build():
    attack()
    return Net()

"""
LATE = """
def attack():
    written = pathlib.Path.write_text
    def forged(self, *args, **more):
        done = written(self, *args, **more)
        if self.name == "reference.json":
            harm(self.parent)
        return done
    pathlib.Path.write_text = forged

def harm(output):
    model = output / "model.onnx"
"""


def code(attack: str, **changes: Any) -> Make:
    """A network of one's own that does this where it is built."""

    def make(root: Path) -> Input:
        torch.manual_seed(0)
        last = torch.nn.Linear(784, 10)
        archive = packed(root / "nets.zip", {"net.py": NETWORK + attack})
        architecture = {"entryPoint": "net:build", "source": located(archive)}
        return Input(_saved({"last.weight": last.weight, "last.bias": last.bias}, root), {"architecture": architecture} | changes)

    return make


def attack(*lines: str) -> Make:
    return code("def attack():\n" + "".join(f"    {line}\n" for line in lines))


def late(*lines: str) -> Make:
    """It does its harm to the hand-over, when convert has all but ended."""
    return code(LATE + "".join(f"    {line}\n" for line in lines))


def located(path: Path) -> dict[str, Any]:
    return {"uri": path.as_uri(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def swapped(model: Callable[[], onnx.ModelProto]) -> Make:
    """Code that hands over another model than it was exported to."""
    text = zlib.compress(model().SerializeToString()).hex()
    return late("import zlib", f"model.write_bytes(zlib.decompress(bytes.fromhex('{text}')))")


def source(write: Callable[[Path], object]) -> Make:
    def make(root: Path) -> Input:
        write(root / "nets.zip")
        architecture = {"entryPoint": "net:build", "source": located(root / "nets.zip")}
        return Input(_saved(_state(), root), {"architecture": architecture})

    return make


def zeros_in(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("net.py", "w", force_zip64=True) as out:
        for _ in range(1100):
            out.write(bytes(2**20))


# --- data sets and pictures --------------------------------------------------------------------------------------------------

PICTURES = {"preprocessing": {"decode": "L", "resize": [28, 28]}, "triton": {"maxBatchSize": 3}}


def samples(name: str, write: Callable[[Path], object], **changes: Any) -> Make:
    def make(root: Path) -> Input:
        write(root / name)
        return Input(_saved(_state(), root), {"verification__samples": located(root / name)} | changes)

    return make


def zipped(**files: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name.replace("__", "."), content)

    return write


def archive_of(name: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, b"")
    return target.getvalue()


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")


def tar_of_links(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def endless_name(path: Path) -> None:
    """A header of 6 GiB, which names one file, in 6 MiB."""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 6 * GIB
    with gzip.open(path, "wb", 1) as out:
        out.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(6 * 16):
            out.write(bytes(2**26))


def zeros_npz(path: Path) -> None:
    """1.2 GiB of samples that are all the same, in 1.2 MiB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (400_000, 1, 28, 28)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("image.npy", "w", force_zip64=True) as out:
        out.write(header.getvalue())
        for _ in range(400):
            out.write(bytes(1000 * 28 * 28 * 4))


# --- the table ---------------------------------------------------------------------------------------------------------------

UNREADABLE, REJECTED = Reason.CHECKPOINT_UNREADABLE, Reason.OUTPUT_REJECTED
RAN = Path("/tmp/perch-hostile-ran")

CASES = [
    # pickles
    Case(
        "a pickle that runs a command",
        weights(lambda: {"c1.weight": Malice()}),
        "convert",
        Reason.UNSAFE_CHECKPOINT,
        "trustSource",
    ),
    Case(
        "a pickle of 200,000 lists in lists",
        pickled(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
        "convert",
        UNREADABLE,
        "type list",
    ),
    Case(
        "a pickle that is all opcodes to push", pickled(b"\x80\x02" + b"(" * 500_000 + b"."), "convert", UNREADABLE, "IndexError"
    ),
    Case(
        "a pickle that says its own text is 2^62 bytes",
        pickled(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."),
        "convert",
        Reason.UNSAFE_CHECKPOINT,
        "Unsupported operand",
    ),
    Case("a pickle with a key that has a million parts", weights(laughing), "convert", UNREADABLE, "a key of type tuple"),
    Case(
        "a tensor of 4 TiB over four bytes",
        weights(lambda: _state() | {"c1.weight": torch.zeros(1).expand(2**40)}),
        "convert",
        Reason.CHECKPOINT_MISMATCH,
        "c1.weight",
    ),
    Case("a bomb in the place of the pickle", bomb("StateDict"), "convert", UNREADABLE, "unpacks to 53"),
    Case(
        "a trusted pickle that ends the process",
        lambda root: Input(
            rezipped(
                _saved(_state(), root), lambda name, content: pickle.dumps(Leaver()) if name.endswith("data.pkl") else content
            ),
            {"checkpoint__trustSource": True},
        ),
        "convert",
        UNREADABLE,
        "SystemExit",
    ),
    # safetensors
    Case("safetensors with a header of 2^63 bytes", safetensors({}, length=2**63), "convert", UNREADABLE, "safetensors"),
    Case("safetensors with a header longer than the file", safetensors({}, length=10_000), "convert", UNREADABLE, "safetensors"),
    Case("safetensors with a header that is no JSON", safetensors(b"[" * 100_000), "convert", UNREADABLE, "safetensors"),
    Case(
        "safetensors whose tensors overlap",
        safetensors({"a": tensor(0, 32, 8), "b": tensor(16, 48, 8)}, bytes(48)),
        "convert",
        UNREADABLE,
        "safetensors",
    ),
    Case("safetensors with a negative place", safetensors({"a": tensor(-32, 0, 8)}), "convert", UNREADABLE, "safetensors"),
    Case(
        "safetensors with a place behind the file",
        safetensors({"a": tensor(0, 2**40, 2**38)}),
        "convert",
        UNREADABLE,
        "safetensors",
    ),
    Case(
        "safetensors whose shape is not its bytes",
        safetensors({"a": tensor(0, 64, 2**62, 4)}),
        "convert",
        UNREADABLE,
        "safetensors",
    ),
    # programs
    Case("TorchScript with a bomb for its code", bomb("TorchScript"), "convert", UNREADABLE, "unpacks to"),
    Case("a program with its members reversed", program(garbled), "convert", UNREADABLE, "TorchExport"),
    Case("a program of 200,000 lists in lists", program(nested_json), "convert", UNREADABLE, "TorchExport"),
    # ONNX
    Case(
        "ONNX with weights in another folder",
        ready_made(lambda: network(initializers=[outside("../secret")])),
        "convert",
        UNREADABLE,
        "other files",
    ),
    Case(
        "ONNX with weights in two places",
        ready_made(lambda: network(initializers=[outside("model.onnx.data", "/etc/passwd")])),
        "convert",
        UNREADABLE,
        "/etc/passwd",
    ),
    Case("ONNX with a tensor of 2^60 numbers and no bytes", ready_made(claims), "convert", UNREADABLE, "tensor name: huge"),
    Case("ONNX that asks for 4 TiB when it runs", ready_made(vast), "convert", Reason.SHAPE_MISMATCH, "does not run"),
    Case("ONNX with an operator that nobody knows", ready_made(unknown("")), "convert", UNREADABLE, "Steal"),
    Case("ONNX with an operator of somebody's domain", ready_made(unknown("com.evil")), "convert", UNREADABLE, "com.evil"),
    Case("ONNX with a function that calls itself", ready_made(recursive), "convert", UNREADABLE, "must not be recursive"),
    Case("ONNX of graphs in graphs", ready_made(deep), "convert", UNREADABLE, "no valid ONNX"),
    Case(
        "ONNX that is a text",
        ready_made(lambda: b"version https://git-lfs.github.com/spec/v1\n" * 100),
        "convert",
        UNREADABLE,
        "no valid ONNX",
    ),
    # sources
    Case("a source that unpacks to 1.1 GiB", source(zeros_in), "convert", Reason.SOURCE_REJECTED, "unpacks to 1,153,433,600"),
    Case("a source that climbs up", source(zipped(**{"../../net__py": b""})), "convert", Reason.SOURCE_REJECTED, "outside"),
    # the user's own code
    Case("code that ends the process as if all were well", attack("os._exit(0)"), "prove", REJECTED, "missing"),
    Case("code that ends the process with the code of a refusal", attack("os._exit(3)"), "convert", None, ""),
    Case("code that becomes another program", attack("os.execv('/bin/true', ['true'])"), "prove", REJECTED, "missing"),
    Case(
        "code that kills its process", attack("os.kill(os.getpid(), signal.SIGKILL)"), "convert", None, "", 128 + signal.SIGKILL
    ),
    Case(
        "code that kills its parent",
        attack("os.kill(os.getppid(), signal.SIGKILL)", "signal.pause()"),
        "convert",
        None,
        "",
        -signal.SIGKILL,
    ),
    Case(
        "code that breaks the interpreter",
        attack("import ctypes", "ctypes.string_at(0)"),
        "convert",
        None,
        "",
        128 + signal.SIGSEGV,
    ),
    Case(
        "code that takes all memory",
        attack("x = [bytearray(2**28) for _ in range(10_000)]"),
        "convert",
        Reason.ENTRY_POINT_FAILED,
        "MemoryError",
    ),
    Case(
        "code that fills the disk",
        attack("import tempfile", "with tempfile.TemporaryFile() as file:", "    while file.write(bytes(2**20)): pass"),
        "convert",
        Reason.ENTRY_POINT_FAILED,
        "File too large",
        file_bytes=2**27,
    ),
    Case("code that calls itself without end", attack("attack()"), "convert", Reason.ENTRY_POINT_FAILED, "RecursionError"),
    Case("code that prints 300 MB", attack("for _ in range(300): print('x' * 10**6)"), "publish", None, "", 0),
    Case("code that leaves a process behind", attack("if os.fork() == 0:", "    signal.pause()"), "publish", None, "", 0),
    # what code hands over
    Case(
        "a link in place of the model",
        late("model.unlink()", "model.symlink_to('/etc/passwd')"),
        "prove",
        REJECTED,
        "not a regular file",
    ),
    Case("a pipe in place of the model", late("model.unlink()", "os.mkfifo(model)"), "prove", REJECTED, "not a regular file"),
    Case("a model of 2 GiB and a byte", late("os.truncate(model, 2**31 + 1)"), "prove", REJECTED, "2,147,483,649"),
    Case(
        "a config of its own",
        late("(output / 'config.pbtxt').write_bytes(b'backend: \"python\"')"),
        "prove",
        REJECTED,
        "config.pbtxt",
    ),
    Case(
        "golden samples that are a bomb",
        late(
            "import zipfile",
            "with zipfile.ZipFile(output / 'golden.npz', 'w', zipfile.ZIP_DEFLATED) as file:",
            "    file.writestr('inputs/image.npy', bytes(2**28))",
        ),
        "prove",
        REJECTED,
        "compressed",
    ),
    Case(
        "golden samples that are none",
        late("import numpy as np", "np.savez(output / 'golden.npz')"),
        "prove",
        REJECTED,
        "there are no inputs",
    ),
    Case(
        "more golden answers than samples",
        late(
            "import numpy as np",
            "made = dict(np.load(output / 'golden.npz'))",
            "made['outputs/logits'] = np.concatenate([made['outputs/logits'], made['outputs/logits']])",
            "np.savez(output / 'golden.npz', **made)",
        ),
        "prove",
        REJECTED,
        "inputs/image 16, outputs/logits 32",
    ),
    Case(
        "golden answers to what was not asked",
        late(
            "import numpy as np",
            "made = dict(np.load(output / 'golden.npz'))",
            "np.savez(output / 'golden.npz', **made, **{'outputs/more': made['outputs/logits']})",
        ),
        "prove",
        REJECTED,
        "golden outputs are ['logits', 'more']",
    ),
    Case("a model of eleven classes", swapped(lambda: network(11)), "prove", Reason.PARITY_FAILED, "has shape [16, 11]"),
    Case("another model", swapped(network), "prove", Reason.PARITY_FAILED, "does not answer as"),
    Case(
        "a model with weights in two places",
        swapped(lambda: network(initializers=[outside("model.onnx.data", "../state/seconds.json")])),
        "prove",
        REJECTED,
        "other files",
    ),
    Case(
        "a model with an operator of somebody's domain", swapped(unknown("com.evil")), "prove", Reason.EXPORT_FAILED, "com.evil"
    ),
    Case("a model that asks for 4 TiB when it runs", swapped(vast), "prove", Reason.EXPORT_FAILED, "does not run"),
    # data sets and pictures
    Case(
        "samples that are all zero, 1.2 GiB in 1.2 MiB",
        samples("data.npz", zeros_npz),
        "prove",
        Reason.PARITY_UNPROVABLE,
        "too alike",
    ),
    Case(
        "samples that are an archive in an archive",
        samples("data.zip", zipped(inner__zip=archive_of("a.png")), **PICTURES),
        "convert",
        Reason.DATASET_UNREADABLE,
        "inner.zip",
    ),
    Case(
        "a picture that unpacks to 64 MiB",
        samples("data.zip", zipped(a__png=bytes(2**26)), **PICTURES),
        "convert",
        Reason.DATASET_UNREADABLE,
        "67,108,864 bytes",
    ),
    Case(
        "a picture of 900 million pixels",
        samples("data.zip", zipped(**{f"{n}__png": png(30_000, 30_000) for n in range(4)}), **PICTURES),
        "convert",
        Reason.DATASET_UNREADABLE,
        "pixels",
    ),
    Case(
        "pictures that are links",
        samples("data.tar", tar_of_links, **PICTURES),
        "convert",
        Reason.DATASET_UNREADABLE,
        "no pictures",
    ),
    Case(
        "a tar with a name of 6 GiB",
        samples("data.tar.gz", endless_name, **PICTURES),
        "convert",
        Reason.DATASET_UNREADABLE,
        "more memory than there is",
    ),
    # the request
    Case(
        "a label that begins another line",
        lambda root: Input(_saved(_state(), root), {"triton__labels": ['cat\nbackend: "python"', *"abcdefghi"]}),
        "fetch",
        Reason.INVALID_REQUEST,
        "labels",
    ),
    Case(
        "a model's name that ends its quotes",
        lambda root: Input(_saved(_state(), root), {"modelName": 'x" backend: "python'}),
        "fetch",
        Reason.INVALID_REQUEST,
        "modelName",
    ),
    Case(
        "overrides that name another backend",
        lambda root: Input(_saved(_state(), root), {"triton__configOverrides": 'backend: "python"'}),
        "fetch",
        Reason.INVALID_REQUEST,
        "backend",
    ),
]


class Leaver:
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (0,)


@pytest.mark.parametrize("case", CASES, ids=[case.sentence for case in CASES])
def test_it_ends_with_its_code_and_its_sentence(case: Case, tmp_path: Path) -> None:
    RAN.unlink(missing_ok=True)
    end = run(case.make(tmp_path), tmp_path, case.file_bytes)
    told = (tmp_path / f"{end.step}.log").read_bytes()[-3000:].decode(errors="replace")
    assert (end.step, end.code) == (case.step, case.code), told
    error = end.summary.error if end.summary else None
    assert (error.reason if error else None) is case.reason, told
    if error:
        assert case.says in error.message
    if case.code == 0:
        assert end.summary is not None
        assert end.summary.outcome is Outcome.PUBLISHED
    else:
        assert not (tmp_path / "repository" / "manifest.json").exists()
    assert not RAN.exists()


def test_there_are_as_many_as_the_documents_say() -> None:
    told = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    assert f"{len(CASES)} hostile or broken inputs" in told


FOREVER = [
    ("code", attack("while True: pass"), "convert"),
    ("code that takes no orders", attack("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "while True: pass"), "convert"),
]


@pytest.mark.parametrize(("make", "step"), [case[1:] for case in FOREVER], ids=[case[0] for case in FOREVER])
def test_what_never_ends_is_ended_from_outside_and_nothing_of_it_is_taken(make: Make, step: str, tmp_path: Path) -> None:
    """In the pod by the Job's activeDeadlineSeconds; here by the test, in its place."""
    with pytest.raises(subprocess.TimeoutExpired):
        run(make(tmp_path), tmp_path, seconds=12)
    assert run_step("prove", tmp_path, tmp_path / "prove.message", GIB, SECONDS) == EXIT_PERMANENT
    summary = Summary.from_json((tmp_path / "prove.message").read_text())
    assert summary.error is not None
    assert summary.error.reason is Reason.OUTPUT_REJECTED
