"""Networks of the user's own: what a source may hold, and what a user reads where it goes wrong."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import convert_and_prove, file_request, packed

from perch_exporter.contract import ExportRequest, Outcome, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.workspace import FIGURES, MODEL, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

import onnxruntime  # noqa: E402

from perch_exporter import user_code  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.publish import publish  # noqa: E402

NETWORK = """
import torch
from torch import nn

from .layers import Scaled


class Net(nn.Module):
    def __init__(self, classes, hidden_size=16, slope=0.1, deep=False):
        super().__init__()
        self.first = Scaled(784, hidden_size)
        self.last = nn.Linear(hidden_size, classes)
        self.slope = slope

    def forward(self, image):
        return self.last(nn.functional.leaky_relu(self.first(image.flatten(1)), self.slope))


def build(**parameters):
    return Net(**parameters)


class Shapes:
    square = Net
"""
LAYERS = """
import torch
from torch import nn


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = torch.tensor([2.0])  # neither parameter nor buffer: lost where a network is built without memory

    def forward(self, x):
        return super().forward(x) * self.scale
"""
FILES = {"nets/__init__.py": "", "nets/model.py": NETWORK, "nets/layers.py": LAYERS}
PARAMETERS = {"classes": 10, "hidden_size": 8, "slope": 0.2, "deep": True}


def own(entry_point: str, archive: Path, **parameters: Any) -> dict[str, Any]:
    source = {"uri": archive.as_uri(), "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    return {"entryPoint": entry_point, "source": source, "parameters": parameters}


def weights(root: Path) -> Path:
    torch.manual_seed(0)
    first, last = torch.nn.Linear(784, 8), torch.nn.Linear(8, 10)
    content = {f"first.{key}": value for key, value in first.state_dict().items()}
    content |= {f"last.{key}": value for key, value in last.state_dict().items()}
    root.mkdir(parents=True, exist_ok=True)
    torch.save(content, root / "v1.pt")
    return root / "v1.pt"


def asked_for(root: Path, files: dict[str, str], entry_point: str = "nets.model:build", **parameters: Any) -> ExportRequest:
    checkpoint = weights(root)
    archive = packed(root / "nets.zip", files)
    return file_request(root, checkpoint, architecture=own(entry_point, archive, **(parameters or PARAMETERS)))


def converted(asked: ExportRequest, root: Path) -> Workspace:
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    return workspace


@pytest.mark.parametrize("entry_point", ["nets.model:build", "nets.model:Shapes.square"])
def test_a_network_of_ones_own_goes_the_whole_way(entry_point: str, tmp_path: Path) -> None:
    asked = asked_for(tmp_path, FILES, entry_point)
    workspace = converted(asked, tmp_path)
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED
    session = onnxruntime.InferenceSession(workspace.output / MODEL)
    images = np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)
    state = torch.load(asked.checkpoint.uri.removeprefix("file://"))
    flat = torch.from_numpy(images).flatten(1)
    hidden = torch.nn.functional.linear(flat, state["first.weight"], state["first.bias"]) * 2
    expected = torch.nn.functional.linear(
        torch.nn.functional.leaky_relu(hidden, 0.2), state["last.weight"], state["last.bias"]
    ).numpy()
    assert np.allclose(session.run(None, {"image": images})[0], expected, atol=1e-5)


WRAPPED = """
import torch

def parallel(**given):
    return torch.nn.DataParallel(build(**given))


def compiled(**given):
    return torch.compile(torch.nn.DataParallel(build(**given)))
"""


@pytest.mark.parametrize("factory", ["parallel", "compiled"])
def test_what_training_puts_around_a_network_is_taken_off(factory: str, tmp_path: Path) -> None:
    asked = asked_for(tmp_path, {**FILES, "nets/model.py": NETWORK + WRAPPED}, f"nets.model:{factory}")
    assert publish(asked, converted(asked, tmp_path), {}).outcome is Outcome.PUBLISHED


KEEPS = {
    "in itself": """
        if self.grid is None:
            self.grid = torch.linspace(0, 1, image.shape[-1])
        return super().forward(image + self.grid)
""",
    "in its module": """
        if not GRIDS:
            GRIDS.append(torch.linspace(0, 1, image.shape[-1]))
        return super().forward(image + GRIDS[0])
""",
}


@pytest.mark.parametrize("where", KEEPS)
def test_a_network_may_keep_a_tensor_at_its_first_call(where: str, tmp_path: Path) -> None:
    caching = f"GRIDS = []\n\n\nclass Caching(Net):\n    grid = None\n\n    def forward(self, image):{KEEPS[where]}"
    workspace = converted(
        asked_for(tmp_path, FILES | {"nets/model.py": NETWORK + caching}, "nets.model:Caching", **PARAMETERS), tmp_path
    )
    assert (workspace.proof / FIGURES).exists()


SHAPES = [
    (
        "each with each",
        [-1],
        "answer @ answer.T",
        r"logits has the shapes \[13, 13\], \[2, 2\], \[1, 1\] in batches .* a row for each sample",
        Reason.EXPORT_FAILED,
    ),
    ("all in one", [], "answer.mean()", "logits has a single number for 16 samples", Reason.SHAPE_MISMATCH),
]


@pytest.mark.parametrize(("shape", "answer", "says", "reason"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_answers_that_are_no_rows_of_samples_are_refused(
    shape: list[int], answer: str, says: str, reason: Reason, tmp_path: Path
) -> None:
    odd = f"class Odd(Net):\n    def forward(self, image):\n        answer = super().forward(image)\n        return {answer}\n"
    asked = asked_for(tmp_path, FILES | {"nets/model.py": NETWORK + odd}, "nets.model:Odd", **PARAMETERS)
    (output,) = asked.outputs
    asked = asked.model_copy(update={"outputs": (output.model_copy(update={"shape": tuple(shape)}),)})
    with pytest.raises(StepFailed, match=says) as caught:
        converted(asked, tmp_path)
    assert caught.value.reason is reason


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("sound", [True, False], ids=["it is built", "an import in it fails"])
def test_a_package_with_folders_of_no_init_file_is_cleaned_away_and_hides_no_error(
    sound: bool, seed: int, tmp_path: Path
) -> None:
    """Such a folder asks its parent package where it lies; whether that one went first depended on the order of a hash."""
    body = "import torch\ndef build(): return torch.nn.Linear(2, 2)\n" if sound else "import requests_that_is_missing\n"
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("nets/__init__.py", "" if sound else "from .sub import model\n")
        archive.writestr("nets/sub/model.py", body)
    script = (
        "import sys; from pathlib import Path; from perch_exporter.contract import Architecture;"
        "from perch_exporter.user_code import opened\n"
        "source = {'uri': 'file:///x.zip', 'sha256': '0' * 64}\n"
        "with opened(Path(sys.argv[1])) as code:\n"
        "    code.build(Architecture(entryPoint='nets.sub.model:build', source=source))\n"
        "print('built', [name for name in sys.modules if name.startswith('nets')])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-c", script, str(tmp_path / "code.zip")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if sound:
        assert ended.stdout.strip() == "built []", ended.stderr
    else:
        assert "No module named 'requests_that_is_missing' (nets/sub/model.py, line 1)" in ended.stderr
        assert "KeyError" not in ended.stderr


def test_nothing_of_it_stays_importable(tmp_path: Path) -> None:
    converted(asked_for(tmp_path, FILES), tmp_path)
    assert not [place for place in sys.path if "perch-source-" in place]
    assert not [name for name in sys.modules if name.partition(".")[0] == "nets"]


def test_fetch_refuses_another_source_than_the_version_says(tmp_path: Path) -> None:
    asked = asked_for(tmp_path, FILES)
    packed(tmp_path / "nets.zip", FILES | {"nets/model.py": NETWORK + "import os\n"})
    with pytest.raises(StepFailed, match=r"source.sha256") as caught:
        fetch(asked, Workspace(tmp_path / "work"), {})
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert not Workspace(tmp_path / "work").object("source").exists()


def test_fetch_refuses_a_source_above_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_for(tmp_path, FILES)
    assert asked.architecture is not None
    monkeypatch.setattr(type(asked.architecture.source), "LIMIT", 100)
    with pytest.raises(StepFailed) as caught:
        fetch(asked, Workspace(tmp_path / "work"), {})
    assert caught.value.reason is Reason.OBJECT_TOO_LARGE


def changed(**files: str) -> dict[str, str]:
    return FILES | {name.replace("__", "/") + ".py": text for name, text in files.items()}


FAILURES: list[tuple[str, dict[str, str], str, dict[str, Any], str]] = [
    ("the module is missing", FILES, "nets.models:build", {}, "No module named 'nets.models'"),
    ("the package is missing", FILES, "net.model:build", {}, "No module named 'net'"),
    ("the name is the image's own", FILES, "torch.nn:Linear", {}, "No module named 'torch.nn' in the source, which holds nets"),
    ("the factory is missing", FILES, "nets.model:make", {}, "has no attribute 'make'"),
    ("what it imports is missing", changed(nets__model="import nowhere\n"), "nets.model:build", {},
     "No module named 'nowhere' (nets/model.py, line 1)"),
    ("it does not parse", changed(nets__model="\n\ndef build(:\n"), "nets.model:build", {}, "(nets/model.py, line 3)"),
    ("it fails in a file that it imports", changed(nets__layers="\n1 / 0\n"), "nets.model:build", {},
     "ZeroDivisionError: division by zero (nets/layers.py, line 2)"),
    ("a parameter is missing", FILES, "nets.model:build", {"slope": 0.1}, "missing 1 required positional argument"),
    ("a parameter is unknown", FILES, "nets.model:build", {"classes": 10, "width": 3}, "with classes=10, width=3: TypeError"),
    ("it ends the process", changed(nets__model="import sys\ndef build(**_):\n  sys.exit('no')\n"), "nets.model:build", {},
     "SystemExit: no (nets/model.py, line 3)"),
    ("it gives no network", changed(nets__model="def build(**_):\n  return 3\n"), "nets.model:build", {},
     "gives a int; it must return a torch.nn.Module"),
    ("the factory is no function", changed(nets__model="build = 3\n"), "nets.model:build", {}, "not callable"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "entry_point", "parameters", "says"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES]
)
def test_a_sentence_says_what_is_wrong_when(
    files: dict[str, str], entry_point: str, parameters: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(StepFailed) as caught:
        converted(asked_for(tmp_path, files, entry_point, **parameters), tmp_path)
    assert caught.value.reason is Reason.ENTRY_POINT_FAILED
    assert says in caught.value.message
    assert "perch-source-" not in caught.value.message


def test_an_error_of_the_forward_pass_names_the_users_line(tmp_path: Path) -> None:
    broken = NETWORK.replace("image.flatten(1)", "image.flatten(0)")
    with pytest.raises(StepFailed, match=r"\(nets/layers.py, line 12\)") as caught:
        converted(asked_for(tmp_path, changed(nets__model=broken)), tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH


def test_a_dict_as_the_answer_is_refused_with_its_keys_and_the_way_out(tmp_path: Path) -> None:
    broken = NETWORK.replace("return self.last(", "return dict(logits=self.last(").replace("self.slope))", "self.slope)))")
    with pytest.raises(StepFailed, match=r"a dict with the keys logits; it must give a tensor, or a tuple") as caught:
        converted(asked_for(tmp_path, changed(nets__model=broken)), tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH


@pytest.mark.parametrize(("made", "kind"), [("bfloat16()", "strided tensor of bfloat16"), ("to_sparse()", "sparse_coo tensor")])
def test_an_answer_that_no_client_could_read_is_refused_with_what_it_is(made: str, kind: str, tmp_path: Path) -> None:
    broken = NETWORK.replace("self.slope))", f"self.slope)).{made}")
    with pytest.raises(StepFailed, match=kind) as caught:
        converted(asked_for(tmp_path, changed(nets__model=broken)), tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH


def test_weights_of_another_network_are_refused_as_for_any_architecture(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"has 10 classes and the architecture 7 .*a factory of your own may call it") as caught:
        converted(asked_for(tmp_path, FILES, **(PARAMETERS | {"classes": 7})), tmp_path)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH


# --- several inputs and outputs ----------------------------------------------------------------------------------------------

SEVERAL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Linear(784, 10)
        self.kind = nn.Embedding(10, 10)

    def forward(self, image, kind, flags):
        logits = self.image(image.float().flatten(1) / 255) + self.kind(kind).sum(1) + flags.float().sum(1, keepdim=True)
        return logits, logits.argmax(1, keepdim=True), logits > 0, logits.half(), logits.argmin(1, keepdim=True).int()


def build():
    return Net()
"""
INPUTS = [
    {"name": "image", "dataType": "UINT8", "shape": [1, 28, 28]},
    {"name": "kind", "dataType": "INT64", "shape": [3]},
    {"name": "flags", "dataType": "BOOL", "shape": [4]},
]
OUTPUTS = [
    {"name": "logits", "dataType": "FP32", "shape": [10]},
    {"name": "label", "dataType": "INT64", "shape": [1]},
    {"name": "positive", "dataType": "BOOL", "shape": [10]},
    {"name": "small", "dataType": "FP16", "shape": [10]},
    {"name": "least", "dataType": "INT32", "shape": [1]},
]


def several(root: Path, **changes: Any) -> ExportRequest:
    torch.manual_seed(0)
    image, kind = torch.nn.Linear(784, 10), torch.nn.Embedding(10, 10)
    torch.save({"image.weight": image.weight, "image.bias": image.bias, "kind.weight": kind.weight}, root / "v1.pt")
    archive = packed(root / "nets.zip", {"several.py": SEVERAL})
    parts = {"inputs": INPUTS, "outputs": OUTPUTS, "architecture": own("several:build", archive)}
    return file_request(root, root / "v1.pt", **(parts | changes))


def test_several_inputs_and_outputs_of_all_types_go_the_whole_way(tmp_path: Path) -> None:
    asked = several(tmp_path)
    workspace = converted(asked, tmp_path)
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED
    session = onnxruntime.InferenceSession(workspace.output / MODEL)
    assert [tensor.type for tensor in session.get_inputs()] == ["tensor(uint8)", "tensor(int64)", "tensor(bool)"]
    assert [tensor.name for tensor in session.get_outputs()] == [spec["name"] for spec in OUTPUTS]


def _typed(tensors: list[dict[str, Any]], name: str, data_type: str) -> list[dict[str, Any]]:
    return [tensor | ({"dataType": data_type} if tensor["name"] == name else {}) for tensor in tensors]


WRONG_TYPES = [
    ("an output", {"outputs": _typed(OUTPUTS, "label", "FP32")}, "say label is FP32, the checkpoint answers INT64"),
    ("an input", {"inputs": _typed(INPUTS, "kind", "FP32")}, "does not take the version's inputs"),
    ("outputs in another order", {"outputs": OUTPUTS[::-1]}, "say least is INT32, the checkpoint answers FP32"),
]


@pytest.mark.parametrize(("changes", "says"), [case[1:] for case in WRONG_TYPES], ids=[case[0] for case in WRONG_TYPES])
def test_a_data_type_is_refused_that_is_not_the_networks_of(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        converted(several(tmp_path, **changes), tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH
    assert says in caught.value.message


# --- archives that mean harm -------------------------------------------------------------------------------------------------


def _entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


def _archive(*entries: tuple[zipfile.ZipInfo | str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in entries:
                archive.writestr(entry, content)

    return write


def _twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        _archive(("a.py", b"1"), ("a.py", b"2"))(path)


def _lying(path: Path) -> None:
    """Its table says 10 bytes where 5,000 are packed."""
    _archive(("a.py", b"1" * 5000))(path)
    content = path.read_bytes()
    path.write_bytes(content.replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little")))


HARM: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a path upwards", _archive(("nets/../../evil.py", b"")), "outside of its folder"),
    ("an absolute path", _archive(("/evil.py", b"")), "outside of its folder"),
    ("a path of another system", _archive(("nets\\..\\..\\evil.py", b"")), "outside of its folder"),
    ("a symlink", _archive((_entry("link", stat.S_IFLNK | 0o777), b"/etc/passwd")), "is a link"),
    ("a device", _archive((_entry("null", stat.S_IFCHR | 0o666), b"")), "is a link or a device"),
    ("a bomb", _archive(("zeros.py", b"\0" * 70_000)), "unpacks to 70,000 bytes"),
    ("a bomb whose table lies", _lying, "cannot be unpacked"),
    ("more files than are taken", _archive(*((f"f{n}.py", b"") for n in range(51))), "51 files"),
    ("a name twice", _twice, "FileExistsError"),
    ("a file where a folder is", _archive(("a", b""), ("a/b.py", b"")), "cannot be unpacked"),
    ("no zip", lambda path: path.write_bytes(b"\x1f\x8bnot a zip"), "BadZipFile"),
    ("an empty file", lambda path: path.write_bytes(b""), "BadZipFile"),
]


@pytest.mark.parametrize(("write", "says"), [case[1:] for case in HARM], ids=[case[0] for case in HARM])
def test_a_source_is_refused_that_has(
    write: Callable[[Path], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_code, "MOST_FILES", 50)
    monkeypatch.setattr(user_code, "MOST_BYTES", 60_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write(tmp_path / "source.zip")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(StepFailed) as caught, user_code.opened(tmp_path / "source.zip"):
        pass
    assert caught.value.reason is Reason.SOURCE_REJECTED
    assert says in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_same_archives_open_where_they_mean_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: files, bytes and modes just within what is taken."""
    monkeypatch.setattr(user_code, "MOST_FILES", 50)
    monkeypatch.setattr(user_code, "MOST_BYTES", 60_000)
    entries = [(f"f{n}.py", b"") for n in range(48)]
    _archive(*entries, (_entry("plain.py", stat.S_IFREG | 0o644), b"x = 1"), ("zeros.py", b"\0" * 59_000))(
        tmp_path / "source.zip"
    )
    with user_code.opened(tmp_path / "source.zip") as code:
        assert len(list(code.folder.iterdir())) == 50
