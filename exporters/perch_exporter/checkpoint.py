"""Reads the checkpoint and puts its weights into the model. Needs torch; runs on bytes that nobody vouches for.

Pickles are opened by torch's weights_only reader, which builds tensors and plain containers and calls nothing else. What it
refuses is refused, and nothing falls back to the other reader: that one is asked only where the request says that the file is
the user's own (`trustSource`), and then what the file does is held by convert's sandbox, as all code of the user's is.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from perch_exporter.contract import CheckpointFormat, Reason
from perch_exporter.failure import StepFailed

log = logging.getLogger(__name__)

StateDict = Mapping[str, torch.Tensor]

_WRAPPERS = ("module.", "_orig_mod.")

MOST_UNPACKED = 2**28
_NAMED_AT_MOST = 6
_SHOWN = 160
"""Characters of a name."""
_COUNTER = "num_batches_tracked"


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
        way_out = (
            f"set checkpoint.stateDictKey to {' or '.join(inside)}, where it keeps tensors"
            if inside and key is None
            else "save model.state_dict() alone, without optimizer or epoch around it"
        )
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint is not a plain state dict: {_some(strangers)} "
            f"{'is' if len(strangers) == 1 else 'are'} no dense tensor under a text key; {way_out}",
        )
    return content


def _under(content: object, key: str) -> object:
    if isinstance(content, Mapping) and key in content:
        return content[key]
    inside = _state_dicts(content)
    if inside:
        there = f"it keeps tensors under {' and '.join(inside)}"
    elif isinstance(content, Mapping) and content and all(_usable(name, value) for name, value in content.items()):
        there = "it is a plain state dict: leave stateDictKey out"
    else:
        names = _some([_key(name) for name in content]) if isinstance(content, Mapping) else ""
        there = f"it has {names}" if names else f"it holds {_kind(content)}"
    raise StepFailed(Reason.CHECKPOINT_UNREADABLE, f"the checkpoint has nothing under checkpoint.stateDictKey {key}; {there}")


def _state_dicts(content: object) -> list[str]:
    """Keys under which a state dict lies."""
    if not isinstance(content, Mapping):
        return []
    found = [
        name
        for name, part in content.items()
        if isinstance(name, str)
        and (
            isinstance(part, nn.Module)
            or (isinstance(part, Mapping) and part and all(_usable(inner, value) for inner, value in part.items()))
        )
    ]
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
        raise StepFailed(Reason.CHECKPOINT_UNREADABLE, f"the checkpoint is not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> object:
    check_unpacked(path, CheckpointFormat.STATE_DICT)
    try:
        # Only torch's zip form can be mapped; the one before version 1.6 is read into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except Exception as error:  # torch raises whatever the broken bytes lead it to
        words = str(error)
        if "TorchScript" in words:
            words = "it is a TorchScript archive; say format: TorchScript, and leave architecture out"
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE,
            f"the checkpoint cannot be read as a state dict: {type(error).__name__}: {words}",
        ) from error


def _read_trusted(path: Path) -> object:
    """Runs whatever the pickle says. Its author's classes are found where a source is open (`user_code.opened`)."""
    check_unpacked(path, CheckpointFormat.STATE_DICT)
    log.info("checkpoint.trustSource: the checkpoint may run code of its own")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ImportError | AttributeError)
        way_out = (
            "; bring its classes in architecture.source, importable by the names that they had in training" if absent else ""
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
    if not (named or is_pickle):
        return StepFailed(Reason.CHECKPOINT_UNREADABLE, f"the checkpoint is not a file of torch.save: {cause}")
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
    weights = _unwrap(weights, expected)
    state = OrderedDict((key, value) for key, value in weights.items() if not key.endswith(_COUNTER) or key in expected)
    # Batch norm's counter serves training only, and old checkpoints lack it.
    state |= {key: torch.tensor(0) for key in expected if key.endswith(_COUNTER) and key not in state}
    _compare({key: tuple(t.shape) for key, t in expected.items()}, {key: tuple(t.shape) for key, t in state.items()})
    # Of which form each module was that wrote them, if the file tells: MNASNet asks. SafeTensors has no place for it.
    written = getattr(weights, "_metadata", None)
    state._metadata = written if isinstance(written, Mapping) else expected._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state, assign=True)
    except Exception as error:  # the network's own word on the weights, or on what the file says of their form
        raise StepFailed(
            Reason.CHECKPOINT_MISMATCH, f"the network does not take the checkpoint's weights: {type(error).__name__}: {error}"
        ) from error
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        # Some networks keep computed tables outside their state dict; those need a real construction.
        model = build()
        model.load_state_dict(state)
    return model.float().eval()


def _unwrap(weights: StateDict, expected: StateDict) -> StateDict:
    """Without what DataParallel, DistributedDataParallel and torch.compile put before every key, where all keys have it."""
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in weights) and not any(key.startswith(prefix) for key in expected):
            log.info("every key of the checkpoint begins with %s, which is stripped", prefix)
            weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    return weights


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
        hint = f"; all of the unexpected ones begin with {prefix}" if (prefix := _common_prefix(unexpected)) else ""
        raise StepFailed(
            Reason.CHECKPOINT_MISMATCH,
            f"the checkpoint's keys are not the architecture's: {' and '.join(parts)}{hint}",
        )
    if differing:
        raise StepFailed(Reason.CHECKPOINT_MISMATCH, _shapes_differ(expected, given, differing))


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
