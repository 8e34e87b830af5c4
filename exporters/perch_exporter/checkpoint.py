"""Reads the checkpoint and puts its weights into the model. Needs torch; runs on bytes that nobody vouches for.

Pickles are opened by torch's weights_only reader, which builds tensors and plain containers and calls nothing else. What it
refuses is refused, and nothing falls back to the other reader: that one is asked only where the request says that the file is
the user's own (`trustSource`), and then what the file does is held by convert's sandbox, as all code of the user's is.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import importlib
import logging
import pathlib
import pickle
import re
import types
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from perch_exporter.contract import CheckpointFormat, Reason
from perch_exporter.failure import StepFailed

log = logging.getLogger(__name__)

StateDict = Mapping[str, torch.Tensor]

_COMPILED = "_orig_mod."
"""What torch.compile puts before the keys of the module that it wraps, wherever that lies."""
_PARALLEL = "module."
"""What DataParallel, DistributedDataParallel and AveragedModel put before every key."""
_AVERAGED = "n_averaged"
"""AveragedModel's own counter beside the weights that it averages."""

MOST_UNPACKED = 2**28
_NAMED_AT_MOST = 6
_SHOWN = 160
"""Characters of a name."""
_COUNTER = "num_batches_tracked"
_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


def read_state_dict(path: Path, form: CheckpointFormat, key: str | None = None, trusted: bool = False) -> StateDict:
    """Tensors by name, mapped from the file where its form allows; `key`: where a training checkpoint keeps them.

    `trusted`: a pickle may run code, and of a whole model in it the weights are taken.

    Raises UnsafeCheckpoint or CheckpointUnreadable.
    """
    if form is CheckpointFormat.SAFE_TENSORS:
        content = _read_safetensors(path)
    else:
        content = _read_trusted(path) if trusted else _read_pickle(path)
    if key is not None:
        content = _under(content, key)
    if isinstance(content, nn.Module):  # comes of a trusted file alone
        log.info("the checkpoint is a whole %s, of which the weights are taken", type(content).__name__)
        content = content.state_dict()
    if not isinstance(content, Mapping) or not content:
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint holds {_kind(content)} and not a state dict; save model.state_dict()",
        )
    strangers = [_key(name) for name, value in content.items() if not _usable(name, value)]
    if strangers:
        inside = _state_dicts(content)
        places = [name if key is None else f"{key}.{name}" for name in inside]
        way_out = (
            f"set checkpoint.stateDictKey to {' or '.join(places)}, where it keeps tensors"
            if places
            else "save model.state_dict() alone, without optimizer or epoch around it"
        )
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint is not a plain state dict: {_some(strangers)} "
            f"{'is' if len(strangers) == 1 else 'are'} no dense tensor under a text key; {way_out}",
        )
    return content


def _under(content: object, key: str) -> object:
    """What lies under the key; under `a.b`, where there is no such key, what lies under `b` in what lies under `a`."""
    if isinstance(content, Mapping) and key in content:
        return content[key]
    inner = content
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    if inner is not None:
        return inner
    inside = _state_dicts(content)
    if inside:
        there = f"it keeps tensors under {' and '.join(inside)}"
    elif isinstance(content, Mapping) and content and all(_usable(name, value) for name, value in content.items()):
        there = "it is a plain state dict: leave stateDictKey out"
    else:
        names = _some([_key(name) for name in content]) if isinstance(content, Mapping) else ""
        there = f"it has {names}" if names else f"it holds {_kind(content)}"
    raise StepFailed(Reason.CHECKPOINT_UNREADABLE, f"the checkpoint has nothing under checkpoint.stateDictKey {key}; {there}")


def _state_dicts(content: object, depth: int = 2) -> list[str]:
    """Keys under which a state dict lies, as stateDictKey has them: `model`, or `state.model` one level deeper."""
    if not isinstance(content, Mapping):
        return []
    found = []
    for name, part in content.items():
        if not isinstance(name, str):
            continue
        if isinstance(part, nn.Module) or (
            isinstance(part, Mapping) and part and all(_usable(inner, value) for inner, value in part.items())
        ):
            found.append(name)
        elif depth > 1:
            found += [f"{name}.{inner}" for inner in _state_dicts(part, depth - 1)]
    return found[:_NAMED_AT_MOST]


def _key(key: object) -> str:
    """Of a hostile one not its text: tuples that are each other's parts many times have more characters than memory."""
    return key if isinstance(key, str) else f"a key of type {type(key).__name__}"


def _usable(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        why = _what_it_is(path) or str(error)
        raise StepFailed(Reason.CHECKPOINT_UNREADABLE, f"the checkpoint is not a safetensors file: {why}") from error


def _read_pickle(path: Path) -> object:
    check_unpacked(path, CheckpointFormat.STATE_DICT)
    try:
        # Only torch's zip form can be mapped; the one before version 1.6 is read into memory.
        with torch.serialization.safe_globals(_plain_data()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except Exception as error:  # torch raises whatever the broken bytes lead it to
        words = str(error)
        if "TorchScript" in words:
            words = "it is a TorchScript archive; say format: TorchScript, and leave architecture out"
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint cannot be read as a state dict: {_what_it_is(path) or f'{type(error).__name__}: {words}'}",
        ) from error


def _plain_data() -> list[Any]:
    """What training scripts keep beside the weights, and what holds data alone: to build one of these runs nobody's code."""
    plain: list[Any] = [
        *(argparse.Namespace, types.SimpleNamespace, collections.Counter),
        *(bool, int, float, str, bytes, list, tuple, dict),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal),
        *(pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, uuid.UUID, set, frozenset, complex, slice, range),
        *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.typecodes["All"] if kind != "O"}),
    ]
    arrays = importlib.import_module("numpy._core.multiarray")
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        plain += [(getattr(arrays, name), f"{module}.{name}") for name in ("scalar", "_reconstruct")]
    return plain


_BEGINNINGS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file itself: run git lfs pull before it is uploaded"),
    (b"<!doctype", "it is a web page: what was downloaded was a page about the file, not the file"),
    (b"<html", "it is a web page: what was downloaded was a page about the file, not the file"),
    (b"<?xml", "it is an XML document, perhaps an object store's error message, not the file"),
    (b"\x1f\x8b", "it is compressed with gzip: upload what is in it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd: upload what is in it"),
    (b"\xfd7zxz", "it is compressed with xz: upload what is in it"),
    (b"\x89hdf", "it is an HDF5 file, as Keras writes them: torch reads none"),
    (b"\x93numpy", "it is an array of numpy's: save the weights with torch.save(model.state_dict(), path)"),
)


def _what_it_is(path: Path) -> str | None:
    """What a file that cannot be read is by its first bytes, and the way out; None where they tell nothing."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    text = start.lstrip().lower()
    for beginning, said in _BEGINNINGS:
        if text.startswith(beginning):
            return said
    if len(start) > 9 and 0 < int.from_bytes(start[:8], "little") < 10**8 and start[8:9] == b"{":
        return "it is a safetensors file: say format: SafeTensors"
    if zipfile.is_zipfile(path):
        return _what_is_in(path)
    if start.startswith(b"PK\x03\x04"):
        return "its end is missing, so it was cut off: copy it again"
    return None


def _what_is_in(path: Path) -> str | None:
    """Of a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    inner = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inner:
        return "it is a TorchScript archive: say format: TorchScript, and leave architecture out"
    if any(name.endswith(("archive_format", "serialized_exported_program.json", "models/model.json")) for name in names):
        return "it is a program of torch.export: say format: TorchExport, and leave architecture out"
    if "data.pkl" in inner:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "it is an npz of numpy's: save the weights with torch.save(model.state_dict(), path)"
    held = [name for name in names if name.lower().endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx"))]
    return f"it is a zip around {held[0][:_SHOWN]}: upload that file itself" if held else "it is a zip, and not one of torch's"


def _read_trusted(path: Path) -> object:
    """Runs whatever the pickle says. Its author's classes are found where a source is open (`user_code.opened`)."""
    check_unpacked(path, CheckpointFormat.STATE_DICT)
    log.info("checkpoint.trustSource: the checkpoint may run code of its own")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
    except (Exception, SystemExit) as error:
        way_out = ""
        if isinstance(error, ImportError | AttributeError):
            way_out = "; bring its classes in architecture.source, importable by the names that they had in training"
        if isinstance(error, AttributeError) and "__main__" in str(error):
            way_out = (
                "; a class that the training script itself defines (__main__) is importable nowhere else: save "
                "model.state_dict(), which needs no class"
            )
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint cannot be read, trusted as it is: {type(error).__name__}: {str(error)[:600]}{way_out}",
        ) from error


def check_unpacked(path: Path, form: CheckpointFormat) -> None:
    """torch stores tensors plainly, and unpacks whatever is packed into memory at once. Raises CheckpointUnreadable."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = sum(entry.file_size for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch's own reader says it better
    if packed > MOST_UNPACKED:
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint cannot be read as {form}: what is compressed in it unpacks to {packed:,} bytes, more than the "
            f"{MOST_UNPACKED:,} that are taken; torch compresses no tensors",
        )


def _refused(path: Path, words: str) -> StepFailed:
    """torch's own words are not passed on whole: they advise to read the file without the protection."""
    named = re.search(r"GLOBAL (\S+)", words)
    detail = words.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    cause = f"it asks for {named[1]}" if named else f"its reader says: {detail.strip()[:300]}"
    with path.open("rb") as file:
        is_pickle = zipfile.is_zipfile(path) or file.read(1) == pickle.PROTO
    if not (named or is_pickle) or _what_it_is(path):
        return StepFailed(
            Reason.CHECKPOINT_UNREADABLE, f"the checkpoint is not a file of torch.save: {_what_it_is(path) or cause}"
        )
    return StepFailed(
        Reason.UNSAFE_CHECKPOINT,
        f"the checkpoint holds more than tensors and was not opened, because unpickling it could run code ({cause}); "
        "save it with safetensors.torch.save_file(model.state_dict(), path) and say format: SafeTensors; or, where you made the "
        "file yourself, say checkpoint.trustSource: true, and it runs in convert's sandbox",
    )


def load_model(build: Callable[[], nn.Module], weights: StateDict, on_meta: bool = True) -> nn.Module:
    """The model with the checkpoint's weights, in FP32 and eval mode. Raises CheckpointMismatch, naming what differs.

    The model is first built without memory (on torch's meta device), so a large one is not initialized for nothing. Not so the
    user's own: what its constructor computes beside parameters and buffers would be lost there.
    """
    with torch.device("meta" if on_meta else "cpu"):
        model = build()
    expected = model.state_dict()
    _refuse_complex(expected, weights)
    weights = _with_tied(_unwrap(weights, expected), model)
    state = OrderedDict((key, value) for key, value in weights.items() if not key.endswith(_COUNTER) or key in expected)
    # Batch norm's counter serves training only, and old checkpoints lack it.
    state |= {key: torch.tensor(0) for key in expected if key.endswith(_COUNTER) and key not in state}
    # Of which form each module was that wrote them, if the file tells: MNASNet asks. SafeTensors has no place for it, and a
    # module that does not know it takes the weights for those of its first form, as torchvision's first published ones are.
    written = getattr(weights, "_metadata", None)
    forms = [written if isinstance(written, Mapping) else expected._metadata, OrderedDict()]
    refusal: Exception | None = None
    for form in forms:
        attempt = state.copy()
        attempt._metadata = form  # type: ignore[attr-defined]
        try:
            # The modules have the first word on their keys: some rename those of former releases.
            model.load_state_dict(attempt, assign=True)
            break
        except Exception as error:  # the network's own word on the weights, or on what the file says of their form
            refusal = refusal or error
    else:
        _compare({key: tuple(t.shape) for key, t in expected.items()}, {key: tuple(t.shape) for key, t in state.items()})
        raise StepFailed(
            Reason.CHECKPOINT_MISMATCH,
            f"the network does not take the checkpoint's weights: {type(refusal).__name__}: {refusal}",
        ) from refusal
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        # Some networks keep computed tables outside their state dict; those need a real construction.
        model = build()
        model.load_state_dict(attempt)
    return model.float().eval()


def _refuse_complex(expected: StateDict, weights: StateDict) -> None:
    """torch drops the imaginary part where it copies one into a real weight."""
    real = {key for key, tensor in expected.items() if not tensor.is_complex()}
    if names := [key for key, tensor in weights.items() if tensor.is_complex() and key in real]:
        raise StepFailed(
            Reason.CHECKPOINT_MISMATCH,
            f"the checkpoint holds complex numbers where the architecture has real ones: {_some(names)}; "
            "save them as real numbers",
        )


def _unwrap(weights: StateDict, expected: StateDict) -> StateDict:
    """The weights under the keys that the network has, where only what wraps it is in the way.

    Taken off is what torch.compile puts before keys anywhere, AveragedModel's counter, and a part before the first dot that all
    keys share and the network's do not (`module.` of DataParallel, `model.` of Lightning). torchvision's DenseNets are renamed as
    torchvision does when it loads its own: `denselayer1.norm.1` became `denselayer1.norm1`.
    """
    found = dict(weights)
    if any(_COMPILED in key for key in found) and not any(_COMPILED in key for key in expected):
        log.info("what torch.compile put before keys of the checkpoint is taken off")
        found = {key.replace(_COMPILED, ""): tensor for key, tensor in found.items()}
    if _AVERAGED in found and _AVERAGED not in expected:
        del found[_AVERAGED]
    bare, prefixes = found, ""
    while (prefix := _common_prefix(list(bare))) and not any(key.startswith(prefix) for key in expected):
        bare, prefixes = {key.removeprefix(prefix): tensor for key, tensor in bare.items()}, prefixes + prefix
        if prefix == _PARALLEL or _fits(bare, expected):
            log.info("every key of the checkpoint begins with %s, which is taken off", prefixes)
            found = bare
    renamed = {_DENSENET.sub(r"\1\2", key): tensor for key, tensor in found.items()}
    if set(renamed) <= set(expected) and not set(found) <= set(expected):
        found = renamed
    if list(found) == list(weights):
        return weights
    kept = OrderedDict(found)
    kept._metadata = getattr(weights, "_metadata", None)  # type: ignore[attr-defined]
    return kept


def _fits(weights: StateDict, expected: StateDict) -> bool:
    """Whether these are the network's own keys, but for counters that serve training only."""
    return {key for key in weights if not key.endswith(_COUNTER)} == {key for key in expected if not key.endswith(_COUNTER)}


def _with_tied(weights: StateDict, model: nn.Module) -> StateDict:
    """The weights, with a tensor that the network has under two names under both: SafeTensors keeps it once."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    more = {
        name: weights[there[0]]
        for tied in names.values()
        if (there := [name for name in tied if name in weights])
        for name in tied
        if name not in weights
    }
    if not more:
        return weights
    whole = OrderedDict({**weights, **more})
    whole._metadata = getattr(weights, "_metadata", None)  # type: ignore[attr-defined]
    return whole


def _compare(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    differing = [key for key in expected if key in given and expected[key] != given[key]]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing)):
        for key in keys:
            log.info("%s: %r", kind, key[:_SHOWN])  # all of them; the sentence has room for a few
    if missing or unexpected:
        parts = [
            f"{len(keys)} {name} ({_some(keys)})" for name, keys in (("missing", missing), ("unexpected", unexpected)) if keys
        ]
        hint = _why_unexpected(set(expected), unexpected)
        raise StepFailed(
            Reason.CHECKPOINT_MISMATCH,
            f"the checkpoint's keys are not the architecture's: {' and '.join(parts)}{hint}",
        )
    if differing:
        raise StepFailed(Reason.CHECKPOINT_MISMATCH, _shapes_differ(expected, given, differing))


def _why_unexpected(expected: set[str], unexpected: list[str]) -> str:
    pruned = [key.removesuffix("_mask") for key in unexpected if key.endswith("_mask")]
    if pruned and all(name in expected and f"{name}_orig" in unexpected for name in pruned):
        return f"; {_some(pruned)} was pruned: call torch.nn.utils.prune.remove(module, name) before it is saved"
    parts = {key.partition(".")[0] + "." for key in unexpected if "." in key}
    for prefix in sorted(parts):
        inner = {key.removeprefix(prefix) for key in unexpected if key.startswith(prefix)}
        if len(parts) > 1 and {key for key in expected if not key.endswith(_COUNTER)} <= inner:
            others = _some(sorted(parts - {prefix}))
            return f"; the network's own ones begin with {prefix} and others with {others}: save that part's state_dict() alone"
    prefix = _common_prefix(unexpected)
    return f"; all of the unexpected ones begin with {prefix}" if prefix else ""


def _shapes_differ(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], differing: list[str]) -> str:
    classes = {(given[key][:1], expected[key][:1]) for key in differing}
    if len(classes) == 1 and all(given[key][1:] == expected[key][1:] for key in differing):
        ((theirs, ours),) = classes
        if theirs and ours:
            return (
                f"the checkpoint has {theirs[0]} classes and the architecture {ours[0]} (by {_some(differing)}); "
                f"set architecture.parameters.numClasses to {theirs[0]} (a factory of your own may call it otherwise)"
            )
    shapes = [f"{key}: checkpoint {list(given[key])}, architecture {list(expected[key])}" for key in differing]
    return f"the checkpoint's shapes are not the architecture's: {_some(shapes)}"


def _common_prefix(keys: list[str]) -> str:
    """The first part of their names, up to a dot, where two keys or more have the same."""
    first = {key.partition(".")[0] for key in keys}
    return f"{first.pop()}." if len(first) == 1 and len(keys) > 1 and all("." in key for key in keys) else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(name[:_SHOWN] for name in names[:_NAMED_AT_MOST]) + more


def _kind(content: object) -> str:
    return "nothing" if isinstance(content, Mapping) else f"an object of type {type(content).__name__}"
