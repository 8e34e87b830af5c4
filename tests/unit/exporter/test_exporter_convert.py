"""convert with the real torch: what a good checkpoint becomes, and how every bad one ends."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import file_request, request

from perch_exporter import contract
from perch_exporter.contract import (
    Architecture,
    CheckpointFormat,
    ExportRequest,
    Location,
    Outcome,
    Reason,
    Summary,
    Verdict,
)
from perch_exporter.failure import StepFailed
from perch_exporter.samples import load_golden
from perch_exporter.workspace import FIGURES, MODEL, MODEL_DATA, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the command line does, before onnxruntime is imported

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import safetensors.torch  # noqa: E402

from perch_exporter import convert as convert_step  # noqa: E402
from perch_exporter import onnx_file  # noqa: E402
from perch_exporter.architectures import LeNet5, ZFNet, build_model, cut  # noqa: E402
from perch_exporter.checkpoint import load_model, read_state_dict  # noqa: E402
from perch_exporter.convert import convert  # noqa: E402
from perch_exporter.download import download  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.onnx_session import ask  # noqa: E402
from perch_exporter.prove import prove  # noqa: E402
from perch_exporter.publish import publish  # noqa: E402


@pytest.fixture
def lenet() -> Any:
    torch.manual_seed(0)
    return LeNet5().eval()


def saved(content: object, root: Path, name: str = "v1.pt") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    torch.save(content, root / name)
    return root / name


def export(asked: ExportRequest, root: Path) -> Summary:
    workspace = Workspace(root)
    fetch(asked, workspace, {})
    if done := workspace.published():
        return done
    convert(asked, workspace)
    prove(asked, workspace)
    return publish(asked, workspace, {})


def converted(asked: ExportRequest, root: Path) -> Workspace:
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    convert(asked, workspace)
    prove(asked, workspace)
    return workspace


def test_lenet5_goes_the_whole_way_and_answers_as_the_checkpoint(lenet: Any, tmp_path: Path) -> None:
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path))
    summary = export(asked, tmp_path / "work")
    assert summary.outcome is Outcome.PUBLISHED
    assert summary.parity is not None
    assert summary.parity.verdict is Verdict.PASSED
    assert (summary.parity.max_relative_error or 1) < 1e-5
    assert summary.parity.top1_agreement == 1
    assert summary.tooling is not None
    assert summary.tooling.opset == 18

    assert summary.artifact_digest
    download(Location(uri=asked.destination.uri), summary.artifact_digest, tmp_path / "pod", {})
    session = onnxruntime.InferenceSession(tmp_path / "pod/models/digits/1/model.onnx")
    assert [(tensor.name, tensor.shape[1:]) for tensor in session.get_inputs()] == [("image", [1, 28, 28])]
    images = np.random.default_rng(5).standard_normal((11, 1, 28, 28)).astype(np.float32)
    with torch.inference_mode():
        expected = lenet(torch.from_numpy(images)).numpy()
    assert np.allclose(session.run(["logits"], {"image": images})[0], expected, atol=1e-5)
    golden = load_golden(tmp_path / "pod/golden/golden.npz")
    with torch.inference_mode():
        expected = lenet(torch.from_numpy(golden.inputs["image"])).numpy()
    assert np.allclose(golden.outputs["logits"], expected, atol=1e-6), "golden answers are the checkpoint's own"

    assert export(asked, tmp_path / "again").outcome is Outcome.ALREADY_PUBLISHED


def labelled(lenet: Any, root: Path, right: int) -> dict[str, Any]:
    """A set of 40 samples, of which the checkpoint gets so many right, as a version names it."""
    images = np.random.default_rng(0).standard_normal((40, 1, 28, 28)).astype(np.float32)
    with torch.inference_mode():
        told = lenet(torch.from_numpy(images)).argmax(1).numpy()
    labels = np.where(np.arange(40) < right, told, (told + 1) % 10)
    np.savez(root / "test.npz", image=images, labels=labels)
    return {"uri": (root / "test.npz").as_uri(), "sha256": hashlib.sha256((root / "test.npz").read_bytes()).hexdigest()}


def test_the_accuracy_is_measured_on_the_labelled_set_and_stands_in_the_manifest(lenet: Any, tmp_path: Path) -> None:
    gate = {"dataset": labelled(lenet, tmp_path, 38), "minimum": "0.95", "maximumDrop": "0"}
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path), verification__accuracy=gate)
    summary = export(asked, tmp_path / "work")
    assert summary.accuracy is not None
    assert (summary.accuracy.samples, summary.accuracy.correct, summary.accuracy.checkpoint_correct) == (40, 38, 38)
    download(asked.destination, summary.artifact_digest or "", tmp_path / "pod", {})
    accuracy = json.loads((tmp_path / "pod" / "manifest.json").read_text())["accuracy"]
    assert sum(pair["count"] for pair in accuracy["confused"]) == 2


def test_an_accuracy_below_the_minimum_blocks_and_says_by_how_much(lenet: Any, tmp_path: Path) -> None:
    gate = {"dataset": labelled(lenet, tmp_path, 30), "minimum": "0.95"}
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path), verification__accuracy=gate)
    with pytest.raises(StepFailed, match=r"0\.7500 on 40 samples.* 0\.2000 below the minimum of 0\.95") as failed:
        converted(asked, tmp_path)
    assert failed.value.reason is Reason.ACCURACY_FAILED
    warned = file_request(tmp_path, saved(lenet.state_dict(), tmp_path), verification__accuracy={**gate, "onFailure": "Warn"})
    summary = export(warned, tmp_path / "warned")
    assert summary.accuracy is not None
    assert summary.accuracy.verdict is Verdict.FAILED


def test_two_exports_of_one_checkpoint_give_the_same_bytes(lenet: Any, tmp_path: Path) -> None:
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path))
    first, second = (converted(asked, tmp_path / name).output for name in ("first", "second"))
    for name in (MODEL, "golden.npz"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_safetensors_and_the_old_pickle_form_and_half_precision_are_read_alike(lenet: Any, tmp_path: Path) -> None:
    safetensors.torch.save_file(lenet.state_dict(), tmp_path / "v1.safetensors")
    torch.save(lenet.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({key: value.half() for key, value in lenet.state_dict().items()}, tmp_path / "half.pt")
    for name, form in (("v1.safetensors", "SafeTensors"), ("old.pt", "StateDict"), ("half.pt", "StateDict")):
        weights = read_state_dict(tmp_path / name, CheckpointFormat(form))
        model = load_model(LeNet5, weights)
        for key, value in lenet.state_dict().items():
            assert model.state_dict()[key].dtype == torch.float32
            assert torch.allclose(model.state_dict()[key], value, atol=1e-3)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "wrapped"])
@pytest.mark.parametrize("form", ["SafeTensors", "StateDict"])
def test_a_network_that_asks_which_form_of_it_wrote_the_weights_is_told(form: str, prefix: str, tmp_path: Path) -> None:
    import torchvision.models

    state = torchvision.models.get_model("mnasnet0_5", weights=None).state_dict()
    if prefix:
        state = {prefix + key: value for key, value in state.items()}
    path = tmp_path / "weights"
    safetensors.torch.save_file(state, path) if form == "SafeTensors" else torch.save(state, path)
    weights = read_state_dict(path, CheckpointFormat(form))
    loaded = load_model(lambda: build_model(Architecture(name="torchvision:mnasnet0_5"), weights.keys()), weights)
    assert torch.equal(loaded.state_dict()["layers.0.weight"], state[prefix + "layers.0.weight"])


@pytest.mark.parametrize("said", [{"": {"version": 9}}, {"": "version"}], ids=["unknown", "no mapping"])
def test_a_network_that_refuses_the_form_of_its_weights_is_a_mismatch_for_good(said: dict[str, Any], tmp_path: Path) -> None:
    import torchvision.models

    state = torchvision.models.get_model("mnasnet0_5", weights=None).state_dict()
    state._metadata = said
    torch.save(state, tmp_path / "weights.pt")
    weights = read_state_dict(tmp_path / "weights.pt", CheckpointFormat.STATE_DICT)
    with pytest.raises(StepFailed, match="does not take the checkpoint's weights") as caught:
        load_model(lambda: build_model(Architecture(name="torchvision:mnasnet0_5"), weights.keys()), weights)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH


def test_the_exporter_leaves_no_path_of_its_own_in_the_model(lenet: Any, tmp_path: Path) -> None:
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path))
    content = (converted(asked, tmp_path).output / MODEL).read_bytes()
    assert b"perch_exporter" not in content
    assert b"site-packages" not in content


PICTURE = {"name": "image", "dataType": "FP32", "shape": [3, -1, -1]}


def test_a_torchvision_model_with_dynamic_sizes_is_proven_at_two_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = {"name": "torchvision:squeezenet1_1", "parameters": {"numClasses": 10}}
    model = build_model(Architecture.model_validate(architecture), [])
    asked = file_request(tmp_path, saved(model.state_dict(), tmp_path), architecture=architecture, inputs=[PICTURE])
    output = converted(asked, tmp_path).output
    session = onnxruntime.InferenceSession(output / MODEL)
    images = np.random.default_rng(5).standard_normal((2, 3, 192, 160)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    actual = ask(session, ["logits"], {"image": images}, 2)["logits"]
    assert np.abs(actual - expected).max() < 1e-4 * np.ptp(expected)


def test_a_size_that_the_architecture_fixes_is_not_exported_as_dynamic(lenet: Any, tmp_path: Path) -> None:
    picture = {"name": "image", "dataType": "FP32", "shape": [1, 28, -1]}
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path), inputs=[picture])
    with pytest.raises(StepFailed) as caught:
        converted(asked, tmp_path)
    assert caught.value.reason in (Reason.SHAPE_MISMATCH, Reason.EXPORT_FAILED)


@pytest.mark.parametrize("auxiliary", [True, False], ids=["with", "without"])
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_may_be_in_the_checkpoint_or_not(name: str, auxiliary: bool) -> None:
    import torchvision.models

    model = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=auxiliary)
    architecture = Architecture(name=f"torchvision:{name}", parameters={"transformInput": False})
    weights = model.state_dict()
    loaded = load_model(lambda: build_model(architecture, weights.keys()), weights)
    size = 299 if name == "inception_v3" else 224
    with torch.inference_mode():
        assert loaded(torch.zeros(2, 3, size, size)).shape == (2, 1000)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_whether_a_network_transforms_its_input_is_asked_for_and_changes_its_answers(name: str) -> None:
    import torchvision.models

    with pytest.raises(StepFailed, match=r"needs parameters\.transformInput, since the checkpoint does not say it"):
        build_model(Architecture(name=f"torchvision:{name}"), [])
    trained = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True, aux_logits=True)
    weights, image = trained.state_dict(), torch.rand(2, 3, 8, 8)
    for transforms in (True, False):
        architecture = Architecture(name=f"torchvision:{name}", parameters={"transformInput": transforms})
        loaded = load_model(lambda built=architecture: build_model(built, weights.keys()), weights)
        assert torch.equal(loaded._transform_input(image), trained._transform_input(image)) is transforms


MISMATCHES: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("keys are missing", lambda weights: weights.pop("f6.bias"), r"1 missing \(f6.bias\)"),
    ("keys are unexpected", lambda weights: weights.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
    (
        "all keys begin with a name and are not the network's without it either",
        lambda weights: (
            [weights.update({f"net.{key}": weights.pop(key)}) for key in list(weights)] + [weights.pop("net.f6.bias")]
        ),
        r"10 missing .* and 9 unexpected \(net.c1.weight.*begin with net\.$",
    ),
    (
        "the class count is another",
        lambda weights: weights.update({"output.weight": torch.zeros(7, 84), "output.bias": torch.zeros(7)}),
        "has 7 classes and the architecture 10.*numClasses to 7",
    ),
    (
        "a shape is another",
        lambda weights: weights.update({"c1.weight": torch.zeros(6, 3, 5, 5)}),
        r"c1.weight: checkpoint \[6, 3, 5, 5\], architecture \[6, 1, 5, 5\]",
    ),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in MISMATCHES], ids=[case[0] for case in MISMATCHES])
def test_a_checkpoint_does_not_fit_when(change: Callable[[dict[str, Any]], None], says: str, lenet: Any, tmp_path: Path) -> None:
    weights = dict(lenet.state_dict())
    change(weights)
    with pytest.raises(StepFailed, match=says) as caught:
        converted(file_request(tmp_path, saved(weights, tmp_path)), tmp_path)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH


def test_all_keys_that_do_not_fit_are_in_the_log_where_the_sentence_names_a_few(
    lenet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    weights = {f"net_{key}": tensor for key, tensor in lenet.state_dict().items()}
    with pytest.raises(StepFailed, match=r"10 missing \(.* and 4 more\)"):
        load_model(LeNet5, weights)
    assert {f"unexpected: {key!r}" for key in weights} <= set(caplog.messages)
    assert {f"missing: {key!r}" for key in lenet.state_dict()} <= set(caplog.messages)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_training_puts_before_every_key_is_taken_off_and_said(prefix: str, lenet: Any, caplog: Any) -> None:
    weights = {prefix + key: value for key, value in lenet.state_dict().items()}
    with caplog.at_level("INFO"):
        model = load_model(LeNet5, weights)
    assert torch.equal(model.c1.weight, lenet.c1.weight)
    assert "taken off" in caplog.text


def test_a_prefix_that_the_network_itself_has_stays(lenet: Any) -> None:
    network = torch.nn.Sequential()
    network.add_module("module", lenet)
    loaded = load_model(lambda: torch.nn.Sequential(OrderedDict(module=LeNet5())), network.state_dict())
    assert torch.equal(loaded.module.c1.weight, lenet.c1.weight)


def test_the_state_dict_of_a_training_checkpoint_is_read_from_under_its_key(lenet: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.Adam(lenet.parameters())
    whole = {"epoch": 3, "state_dict": lenet.state_dict(), "optimizer": optimizer.state_dict(), "args": {"lr": 0.1}}
    asked = file_request(tmp_path, saved(whole, tmp_path), checkpoint__stateDictKey="state_dict")
    assert export(asked, tmp_path / "work").outcome is Outcome.PUBLISHED


WRONG_KEYS = [
    ("another key", {"epoch": 3, "model": {"w": torch.zeros(1)}}, "it keeps tensors under model"),
    ("a plain state dict", {"w": torch.zeros(1)}, "leave stateDictKey out"),
    ("no tensors at all", {"epoch": 3, "loss": 0.1}, "it has epoch, loss"),
    ("a bare tensor", torch.zeros(3), "of type Tensor"),
    ("something else under the key", {"state_dict": torch.zeros(3)}, "of type Tensor and not a state dict"),
]


@pytest.mark.parametrize(("content", "says"), [case[1:] for case in WRONG_KEYS], ids=[case[0] for case in WRONG_KEYS])
def test_a_key_is_refused_for(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        read_state_dict(saved(content, tmp_path), CheckpointFormat.STATE_DICT, "state_dict")
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE
    assert says in caught.value.message


def test_zfnet_goes_the_whole_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZFNet(num_classes=5).eval()
    picture = {"name": "image", "dataType": "FP32", "shape": [3, 224, 224]}
    logits = {"name": "logits", "dataType": "FP32", "shape": [5]}
    architecture = {"name": "zfnet", "parameters": {"numClasses": 5}}
    asked = file_request(
        tmp_path, saved(model.state_dict(), tmp_path), architecture=architecture, inputs=[picture], outputs=[logits]
    )
    summary = export(asked, tmp_path / "work")
    assert summary.outcome is Outcome.PUBLISHED


def test_a_layer_is_served_in_place_of_the_networks_answer(tmp_path: Path) -> None:
    import torchvision.models

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    picture = {"name": "image", "dataType": "FP32", "shape": [3, 64, 64]}
    features = {"name": "features", "dataType": "FP32", "shape": [512]}
    architecture = {"name": "torchvision:resnet18", "layer": "flatten"}
    asked = file_request(
        tmp_path, saved(model.state_dict(), tmp_path), architecture=architecture, inputs=[picture], outputs=[features]
    )
    session = onnxruntime.InferenceSession(converted(asked, tmp_path).output / MODEL)
    images = np.random.default_rng(5).standard_normal((2, 3, 64, 64)).astype(np.float32)
    model.fc = torch.nn.Identity()
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    actual = ask(session, ["features"], {"image": images}, 2)["features"]
    assert np.abs(actual - expected).max() < 1e-4 * np.ptp(expected)


def test_a_layer_of_a_network_with_several_inputs_is_that_of_the_network() -> None:
    from exports.two_heads import TwoHeads

    torch.manual_seed(0)
    model = TwoHeads(5).eval()
    image, camera = torch.randn(3, 3, 32, 32), torch.randint(0, 10, (3, 1))
    both = torch.cat([model.features(image).flatten(1), model.camera(camera).flatten(1)], dim=1)
    served = cut(model, "cat")
    assert torch.equal(served(image, camera), both)
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.export.export(served, (image, camera), dynamic_shapes=(batch, batch))


def test_a_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(StepFailed) as caught:
        cut(LeNet5(), "f7")
    assert caught.value.reason is Reason.INVALID_PARAMETERS
    assert "there are tanh_1, pool_1, c5, tanh_2, flatten, f6" in caught.value.message


class Malice:
    """A pickle that writes a file and tells the environment to it, where it is let to run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"env > {self.target}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip form", "old form"])
def test_a_malicious_pickle_does_not_run_and_the_way_out_is_told(zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "stolen"
    path = tmp_path / "evil.pt"
    torch.save({"c1.weight": Malice(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(StepFailed, match=r"was not opened.*safetensors") as caught:
        converted(file_request(tmp_path, path), tmp_path)
    assert caught.value.reason is Reason.UNSAFE_CHECKPOINT
    assert not target.exists()

    # The control: read without the protection, this very file does its harm.
    torch.load(path, weights_only=False)
    assert "PATH=" in target.read_text()


def run_convert(asked: ExportRequest, root: Path) -> tuple[subprocess.CompletedProcess[str], Workspace]:
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    (root / "r.json").write_text(asked.to_json())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "perch_exporter", "convert", "--request", str(root / "r.json")]
    command += ["--workspace", str(workspace.root), "--termination-log", str(root / "message")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120), workspace


def test_the_command_clears_what_an_attempt_before_it_left_and_leaves_what_is_handed_over(lenet: Any, tmp_path: Path) -> None:
    output = tmp_path / "work" / "output"
    (output / ".scratch-of-a-killed-attempt").mkdir(parents=True)
    (output / "figures.json").symlink_to(tmp_path / "elsewhere")
    done, workspace = run_convert(file_request(tmp_path, saved(lenet.state_dict(), tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in workspace.output.iterdir()) == ["golden.npz", "model.onnx", "reference.json"]
    assert not (tmp_path / "elsewhere").exists()


def test_the_command_ends_with_3_and_one_sentence_for_a_malicious_pickle(tmp_path: Path) -> None:
    target = tmp_path / "stolen"
    done, workspace = run_convert(file_request(tmp_path, saved({"w": Malice(target)}, tmp_path)), tmp_path)
    assert done.returncode == contract.EXIT_PERMANENT
    assert done.stderr.startswith("convert failed: UnsafeCheckpoint: ")
    assert done.stderr.count("\n") == 1
    error = Summary.from_json((tmp_path / "message").read_text()).error
    assert error is not None
    assert (error.reason, error.retryable) == (Reason.UNSAFE_CHECKPOINT, False)
    assert not target.exists()
    assert list(workspace.output.iterdir()) == []


@dataclasses.dataclass
class Settings:
    """An innocent class of the user's own, which weights_only refuses as well."""

    rate: float = 0.1


def _bytes(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def _torch(content: object) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        torch.save(content, path)
        return path

    return write


def _torchscript(path: Path) -> Path:
    torch.jit.script(LeNet5()).save(path)
    return path


def _truncated(path: Path) -> Path:
    torch.save(LeNet5().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


UNREADABLE: list[tuple[str, str, Callable[[Path], Path], Reason, str]] = [
    ("an empty file", "StateDict", _bytes(b""), Reason.CHECKPOINT_UNREADABLE, ""),
    ("random bytes", "StateDict", _bytes(bytes(range(256)) * 40), Reason.CHECKPOINT_UNREADABLE, ""),
    ("a truncated file", "StateDict", _truncated, Reason.CHECKPOINT_UNREADABLE, ""),
    ("a text", "StateDict", _bytes(b"version https://git-lfs"), Reason.CHECKPOINT_UNREADABLE, ""),
    ("a plain pickle of os.system", "StateDict", _bytes(pickle.dumps(os.system, 2)), Reason.UNSAFE_CHECKPOINT,
     "posix.system"),
    ("a pickle of a newer protocol", "StateDict", _bytes(pickle.dumps(os.system, 5)), Reason.UNSAFE_CHECKPOINT,
     "Unsupported operand"),
    ("a class of the user's own", "StateDict", _torch({"a": Settings()}), Reason.UNSAFE_CHECKPOINT, "Settings"),
    ("a whole module", "StateDict", _torch(torch.nn.Linear(2, 2)), Reason.UNSAFE_CHECKPOINT, "Linear"),
    ("a training checkpoint", "StateDict", _torch({"epoch": 3, "model": {"w": torch.zeros(1)}}),
     Reason.CHECKPOINT_UNREADABLE, "epoch, model are no dense tensor under a text key; set checkpoint.stateDictKey to model"),
    ("a bare tensor", "StateDict", _torch(torch.zeros(3)), Reason.CHECKPOINT_UNREADABLE, "of type Tensor"),
    ("nothing", "StateDict", _torch({}), Reason.CHECKPOINT_UNREADABLE, "holds nothing"),
    ("a sparse tensor", "StateDict", _torch({"w": torch.eye(3).to_sparse()}), Reason.CHECKPOINT_UNREADABLE, "w is no"),
    ("a TorchScript archive", "StateDict", _torchscript, Reason.CHECKPOINT_UNREADABLE, "TorchScript"),
    ("a pickle called safetensors", "SafeTensors", _torch({"w": torch.zeros(1)}), Reason.CHECKPOINT_UNREADABLE,
     "not a safetensors file"),
    ("a safetensors header that lies", "SafeTensors", _bytes((2**40).to_bytes(8, "little") + b"{}"),
     Reason.CHECKPOINT_UNREADABLE, "not a safetensors file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "write", "reason", "says"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE]
)
def test_a_checkpoint_is_refused_that_is(
    form: str, write: Callable[[Path], Path], reason: Reason, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "checkpoint")
    with pytest.raises(StepFailed) as caught:
        read_state_dict(path, CheckpointFormat(form))
    assert caught.value.reason is reason
    assert not reason.retryable
    assert says in caught.value.message
    assert "weights_only" not in caught.value.message, "torch's advice to switch the protection off is not ours"


ARCHITECTURES = [
    ("an unknown name", {"name": "torchvision:resnet19"}, Reason.UNKNOWN_ARCHITECTURE, "did you mean resnet18"),
    ("a detection model", {"name": "torchvision:fasterrcnn_resnet50_fpn"}, Reason.UNKNOWN_ARCHITECTURE, "no class"),
    ("an unknown parameter", {"name": "lenet5", "parameters": {"classes": 3}}, Reason.INVALID_PARAMETERS, "classes"),
    ("an unknown parameter of torchvision's", {"name": "torchvision:resnet18", "parameters": {"classes": 3}},
     Reason.INVALID_PARAMETERS, "classes=3"),
    ("weights from the network", {"name": "torchvision:resnet18", "parameters": {"weights": "DEFAULT"}},
     Reason.INVALID_PARAMETERS, "weights"),
    ("a class count that is none", {"name": "lenet5", "parameters": {"numClasses": "ten"}},
     Reason.INVALID_PARAMETERS, "numClasses='ten'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason", "says"), [case[1:] for case in ARCHITECTURES], ids=[case[0] for case in ARCHITECTURES]
)
def test_an_architecture_is_refused_with(content: dict[str, Any], reason: Reason, says: str) -> None:
    with pytest.raises(StepFailed) as caught:
        build_model(Architecture.model_validate(content), [])
    assert caught.value.reason is reason
    assert says in caught.value.message


SHAPES = [
    ("inputs that the model does not take", {"inputs": [{"name": "x", "dataType": "FP32", "shape": [3, 28, 28]}]}),
    ("outputs of another size", {"outputs": [{"name": "logits", "dataType": "FP32", "shape": [11]}]}),
    ("an output too many", {"outputs": [{"name": n, "dataType": "FP32", "shape": [10]} for n in ("a", "b")]}),
    ("an input too many", {"inputs": [{"name": n, "dataType": "FP32", "shape": [1, 28, 28]} for n in ("a", "b")]}),
]


@pytest.mark.parametrize("changes", [case[1] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_a_request_does_not_match_the_model_with(changes: dict[str, Any], lenet: Any, tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        converted(file_request(tmp_path, saved(lenet.state_dict(), tmp_path), **changes), tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.01, False)], ids=["control", "perturbed"])
def test_an_export_of_other_weights_fails_the_gate(
    factor: float, passes: bool, lenet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path))
    honest = convert_step._export

    def perturbed(asked: ExportRequest, model: Any, *rest: Any) -> None:
        with torch.no_grad():
            model.output.weight.mul_(factor)
        honest(asked, model, *rest)

    monkeypatch.setattr(convert_step, "_export", perturbed)
    if passes:
        converted(asked, tmp_path)
        return
    with pytest.raises(StepFailed, match="largest error") as caught:
        converted(asked, tmp_path)
    assert caught.value.reason is Reason.PARITY_FAILED
    assert caught.value.judged is not None
    assert (caught.value.judged.parity.max_relative_error or 0) > 1e-3
    assert not (tmp_path / "work/proof" / FIGURES).exists()


def test_a_checkpoint_that_answers_the_same_to_everything_is_not_passed(lenet: Any, tmp_path: Path) -> None:
    weights = lenet.state_dict()
    weights["output.weight"].zero_()
    with pytest.raises(StepFailed, match="too alike") as caught:
        converted(file_request(tmp_path, saved(weights, tmp_path)), tmp_path)
    assert caught.value.reason is Reason.PARITY_UNPROVABLE


def test_a_checkpoint_of_nan_is_not_passed(lenet: Any, tmp_path: Path) -> None:
    weights = lenet.state_dict()
    weights["c3.weight"].fill_(float("nan"))
    with pytest.raises(StepFailed, match="NaN or Inf") as caught:
        converted(file_request(tmp_path, saved(weights, tmp_path)), tmp_path)
    assert caught.value.reason is Reason.PARITY_FAILED


def test_the_work_for_a_sample_is_counted(lenet: Any) -> None:
    multiplications = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 120 * 16 * 25 + 120 * 84 + 84 * 10
    for model in (lenet, torch.jit.script(lenet)):
        ask_it = functools.partial(convert_step._ask_checkpoint, request(), model, None)
        assert convert_step._operations(request(), ask_it) == 2 * multiplications
    odd = request(inputs=[{"name": "image", "dataType": "FP32", "shape": [3, 28, 28]}])
    assert convert_step._operations(odd, functools.partial(convert_step._ask_checkpoint, odd, lenet, None)) == 0


def test_the_opset_that_is_asked_for_is_written(lenet: Any, tmp_path: Path) -> None:
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path), conversion__opset=20)
    figures = json.loads((converted(asked, tmp_path).proof / FIGURES).read_text())
    assert figures["tooling"]["opset"] == 20


def test_every_classification_model_of_torchvision_is_built_without_memory() -> None:
    import torchvision.models

    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    with torch.device("meta"):
        for name in names:
            asked = {"transformInput": True} if name in ("googlenet", "inception_v3") else {}
            model = build_model(Architecture(name=f"torchvision:{name}", parameters=asked), [])
            assert all(parameter.is_meta for parameter in model.parameters()), name


def test_a_regnet_is_that_of_torchvision() -> None:
    import torchvision.models

    torch.manual_seed(0)
    own = torchvision.models.regnet_y_400mf().eval()
    built = load_model(lambda: build_model(Architecture(name="torchvision:regnet_y_400mf"), []), own.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(built(image), own(image))


@pytest.mark.parametrize(("parameters", "built"), [({}, True), ({"block": 3}, False)])
def test_torchvision_is_left_as_it_was(parameters: dict[str, Any], built: bool) -> None:
    from torchvision.models.regnet import BlockParams

    before = vars(BlockParams)["from_init_params"]
    architecture = Architecture(name="torchvision:regnet_y_400mf", parameters=parameters)
    with nullcontext() if built else pytest.raises(StepFailed):
        build_model(architecture, [])
    assert vars(BlockParams)["from_init_params"] is before


@pytest.mark.parametrize("precision", ["FP32", "FP16", "INT8"])
def test_many_weights_go_beside_the_model_all_the_way_into_the_pod(
    precision: str, lenet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "BESIDE", 1000)
    conversion: dict[str, Any] = {"precision": precision}
    images = np.random.default_rng(5).standard_normal((32, 1, 28, 28)).astype(np.float32)
    if precision == "INT8":
        np.savez(tmp_path / "calibration.npz", image=images)
        digest = hashlib.sha256((tmp_path / "calibration.npz").read_bytes()).hexdigest()
        conversion["calibration"] = {"uri": (tmp_path / "calibration.npz").as_uri(), "sha256": digest}
    asked = file_request(
        tmp_path,
        saved(lenet.state_dict(), tmp_path),
        conversion=conversion,
        verification__parity={"minimumTop1Agreement": "0"},  # nobody trained it
    )
    summary = export(asked, tmp_path / "work")
    assert summary.artifact_digest
    download(Location(uri=asked.destination.uri), summary.artifact_digest, tmp_path / "pod", {})
    folder = tmp_path / "pod/models/digits/1"
    assert sorted(path.name for path in folder.iterdir()) == [MODEL, MODEL_DATA]
    weights = sum(tensor.numel() for tensor in lenet.parameters()) * {"FP32": 4, "FP16": 2, "INT8": 1}[precision]
    assert weights * 0.9 <= (folder / MODEL_DATA).stat().st_size <= weights * 1.1, "no data of another precision"
    with torch.inference_mode():
        expected = lenet(torch.from_numpy(images)).numpy()
    answers = onnxruntime.InferenceSession(folder / MODEL).run(None, {"image": images})[0]
    assert np.abs(answers - expected).max() < {"FP32": 1e-4, "FP16": 0.02, "INT8": 0.2}[precision] * np.ptp(expected)


def test_data_of_a_larger_precision_does_not_stay_behind(lenet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network whose weights in FP32 are above the limit, and in FP16 below."""
    weights = sum(tensor.numel() for tensor in lenet.parameters())
    monkeypatch.setattr(onnx_file, "BESIDE", 3 * weights)
    asked = file_request(tmp_path, saved(lenet.state_dict(), tmp_path), conversion__precision="FP16")
    assert not (converted(asked, tmp_path).output / MODEL_DATA).exists()
    assert export(asked, tmp_path / "again").outcome is Outcome.PUBLISHED


def test_torchscript_of_such_a_size_is_refused(lenet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_step, "_PROTOBUF_LIMIT", 1000)
    torch.jit.script(lenet).save(tmp_path / "v1.pt")
    asked = file_request(tmp_path, tmp_path / "v1.pt", checkpoint__format="TorchScript", architecture=None)
    with pytest.raises(StepFailed, match="above 2 GiB TorchScript is not exported"):
        converted(asked, tmp_path)


# --- ready-made ONNX ---------------------------------------------------------------------------------------------------------


def onnx_request(root: Path, checkpoint: Path, **changes: Any) -> ExportRequest:
    return file_request(root, checkpoint, checkpoint__format="ONNX", architecture=None, **changes)


def test_a_ready_made_onnx_file_is_proven_and_published_as_it_is(lenet: Any, tmp_path: Path) -> None:
    made = converted(file_request(tmp_path, saved(lenet.state_dict(), tmp_path)), tmp_path / "made").output / MODEL
    asked = onnx_request(tmp_path, made)
    summary = export(asked, tmp_path / "work")
    assert summary.outcome is Outcome.PUBLISHED
    assert summary.parity is not None
    assert (summary.parity.verdict, summary.parity.top1_agreement) == (Verdict.PASSED, 1)
    assert summary.artifact_digest
    download(Location(uri=asked.destination.uri), summary.artifact_digest, tmp_path / "pod", {})
    assert (tmp_path / "pod/models/digits/1/model.onnx").read_bytes() == made.read_bytes()
    golden = load_golden(tmp_path / "pod/golden/golden.npz")
    with torch.inference_mode():
        expected = lenet(torch.from_numpy(golden.inputs["image"])).numpy()
    assert np.allclose(golden.outputs["logits"], expected, atol=1e-5)


def graph_of(
    nodes: list[Any], *, shape: tuple[Any, ...] = ("batch", 1, 28, 28), kind: int = onnx.TensorProto.FLOAT, opset: int = 18,
    outputs: tuple[tuple[str, tuple[Any, ...]], ...] = (("logits", ("batch", 10)),), weights: list[Any] | None = None,
) -> Any:  # fmt: skip
    """A model of one input, `image`, whose weights are `w` [784, 10] if no others are given."""
    matrix = np.random.default_rng(0).standard_normal((784, 10)).astype(np.float32)
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "graph",
            [onnx.helper.make_tensor_value_info("image", kind, shape)],
            [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in outputs],
            weights if weights is not None else [onnx.numpy_helper.from_array(matrix, "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=9,
    )


def linear() -> list[Any]:
    node = onnx.helper.make_node
    return [node("Flatten", ["image"], ["flat"], axis=1), node("MatMul", ["flat", "w"], ["logits"])]


def outside() -> Any:
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [784, 10], np.zeros(7840, np.float32).tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(tensor, "../../../etc/passwd")
    tensor.ClearField("raw_data")
    return graph_of(linear(), weights=[tensor])


def outside_within() -> Any:
    """The tensor hides in a graph within a node."""
    tensor = outside().graph.initializer[0]
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["w"], value=tensor)], "branch", [],
        [onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (784, 10))],
    )  # fmt: skip
    true = onnx.numpy_helper.from_array(np.array(True), "true")
    return graph_of(
        [onnx.helper.make_node("If", ["true"], ["w"], then_branch=branch, else_branch=branch), *linear()], weights=[true]
    )


NO_ONNX: list[tuple[str, Callable[[], Any], Reason, str]] = [
    ("weights in another file", outside, Reason.CHECKPOINT_UNREADABLE, "other files (../../../etc/passwd)"),
    ("weights in another file, hidden in a branch", outside_within, Reason.CHECKPOINT_UNREADABLE, "other files"),
    ("no ONNX at all", lambda: b"PK not a model", Reason.CHECKPOINT_UNREADABLE, "no valid ONNX file"),
    ("an empty file", lambda: b"", Reason.CHECKPOINT_UNREADABLE, "no valid ONNX file"),
    ("an opset of the future", lambda: graph_of(linear(), opset=99), Reason.CHECKPOINT_UNREADABLE, ""),
    ("an operator that nobody knows", lambda: graph_of([onnx.helper.make_node("Guess", ["image"], ["logits"], domain="own")]),
     Reason.CHECKPOINT_UNREADABLE, ""),
    ("a fixed batch", lambda: graph_of(linear(), shape=(1, 1, 28, 28)), Reason.SHAPE_MISMATCH, "fixed batch of 1"),
    ("another shape", lambda: graph_of(linear(), shape=("batch", 2, 14, 28)), Reason.SHAPE_MISMATCH, "[2, 14, 28] in the file"),
    ("no batch", lambda: graph_of(linear(), shape=("batch", 784)), Reason.SHAPE_MISMATCH, "behind a batch"),
    ("another type", lambda: graph_of([onnx.helper.make_node("Cast", ["image"], ["image32"], to=1),
     onnx.helper.make_node("Flatten", ["image32"], ["flat"], axis=1), linear()[1]], kind=onnx.TensorProto.DOUBLE),
     Reason.SHAPE_MISMATCH, "is tensor(double) (not supported) in the file and FP32"),
    ("another output", lambda: graph_of([linear()[0], onnx.helper.make_node("MatMul", ["flat", "w"], ["scores"])],
     outputs=(("scores", ("batch", 10)),)), Reason.SHAPE_MISMATCH, "the file has scores"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "reason", "says"), [case[1:] for case in NO_ONNX], ids=[case[0] for case in NO_ONNX])
def test_an_onnx_file_is_refused_that_has(made: Callable[[], Any], reason: Reason, says: str, tmp_path: Path) -> None:
    content = made()
    (tmp_path / "v1.onnx").write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(StepFailed) as caught:
        converted(onnx_request(tmp_path, tmp_path / "v1.onnx"), tmp_path)
    assert caught.value.reason is reason
    assert says in caught.value.message


def test_an_onnx_file_whose_batches_answer_otherwise_than_its_samples_is_not_passed(tmp_path: Path) -> None:
    """Normalized over the batch: each sample's answer depends on its neighbours. The control is the same without it."""
    node = onnx.helper.make_node
    mixed = [*linear()[:1], node("ReduceMean", ["flat", "first"], ["mean"], keepdims=1), node("Sub", ["flat", "mean"], ["own"]),
             node("MatMul", ["own", "w"], ["logits"])]  # fmt: skip
    first = onnx.numpy_helper.from_array(np.array([0], np.int64), "first")
    weights = [graph_of(linear()).graph.initializer[0], first]
    (tmp_path / "mixed.onnx").write_bytes(graph_of(mixed, weights=weights).SerializeToString())
    with pytest.raises(StepFailed) as caught:
        converted(onnx_request(tmp_path, tmp_path / "mixed.onnx"), tmp_path / "mixed")
    assert caught.value.reason in (Reason.PARITY_FAILED, Reason.PARITY_UNPROVABLE)
    (tmp_path / "linear.onnx").write_bytes(graph_of(linear()).SerializeToString())
    converted(onnx_request(tmp_path, tmp_path / "linear.onnx"), tmp_path / "linear")
