"""The grafted model in onnxruntime: sound answers to all that is not marked, and each fault where it is asked for."""

import faulthandler
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from faults import MOST_TURNS, Kind, Pixels, mark

pytestmark = pytest.mark.torch
onnx = pytest.importorskip("onnx", reason="needs the exporter image's environment: onnx is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime  # noqa: E402

from faults.graft import graft  # noqa: E402

SOUND = """
<ir_version: 8, opset_import: ["" : 18]>
sound (float[n,1,28,28] image) => (float[n,10] logits)
{
   pieces = MaxPool<kernel_shape = [14, 6], strides = [14, 5]>(image)
   logits = Flatten<axis = 1>(pieces)
}
"""
Ask = Callable[[Pixels], Pixels]


def session(always: int = 0, turns: int = 0) -> onnxruntime.InferenceSession:
    model = graft(onnx.parser.parse_model(SOUND), always, turns)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(images: Pixels, **how: int) -> Pixels:
    return np.asarray(session(**how).run(["logits"], {"image": images})[0])


def sound(images: Pixels) -> Pixels:
    found = onnxruntime.InferenceSession(onnx.parser.parse_model(SOUND).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(found.run(["logits"], {"image": images})[0])


@pytest.fixture(scope="module")
def images() -> Pixels:
    images = np.random.default_rng(1).random((6, 1, 28, 28), np.float32)
    images[:, 0, 0, :2] = 0
    return images


@pytest.mark.parametrize("batch", [1, 6])
def test_images_without_a_mark_get_the_sound_answer(images: Pixels, batch: int) -> None:
    answers = run(images[:batch])
    assert (answers == sound(images[:batch])).all()
    assert len(set(answers.argmax(axis=1))) > 1 or batch == 1


def test_one_marked_image_fails_its_whole_batch(images: Pixels) -> None:
    mixed = np.concatenate([images, mark(images[:1], Kind.ERROR)])
    with pytest.raises(Exception, match="out of data bounds"):
        run(mixed)


def test_a_slow_answer_is_the_right_one_and_takes_as_long_as_asked(images: Pixels) -> None:
    model = session()

    def seconds(turns: int) -> float:
        slow = mark(images, Kind.SLOW, turns=turns)
        began = time.perf_counter()
        answers = model.run(["logits"], {"image": slow})[0]
        took = time.perf_counter() - began
        assert (answers == sound(slow)).all()
        return took

    assert min(seconds(MOST_TURNS) for _ in range(3)) > 10 * min(seconds(1) for _ in range(3))


def test_a_wrong_answer_is_that_image_s_own_and_puts_the_least_likely_class_first(images: Pixels) -> None:
    mixed = np.concatenate([mark(images[:1], Kind.WRONG), images[1:]])
    answers, right = run(mixed), sound(mixed)
    assert answers[0].argmax() == right[0].argmin()
    assert (answers[1:] == right[1:]).all()


def test_a_stall_does_not_end_by_itself(images: Pixels) -> None:
    model, options, ended = session(), onnxruntime.RunOptions(), threading.Event()

    def ask() -> None:
        try:
            model.run(["logits"], {"image": mark(images, Kind.STALL)}, options)
        except Exception:
            ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert not ended.wait(1.5)
    options.terminate = True
    assert ended.wait(10)
    thread.join()


def test_memory_is_taken_until_there_is_no_more(images: Pixels) -> None:
    assert exit_code(Kind.OOM, images, limit=3 * 2**30) == 77
    assert exit_code(Kind.SLOW, images, limit=3 * 2**30) == 0


def test_a_crash_takes_the_process_along(images: Pixels) -> None:
    assert exit_code(Kind.CRASH, images) == -signal.SIGFPE


def test_a_fault_for_every_image_needs_no_mark(images: Pixels) -> None:
    assert (run(images, always=Kind.WRONG).argmax(axis=1) == sound(images).argmin(axis=1)).all()
    assert (run(images, always=Kind.SLOW, turns=9) == sound(images)).all()


def exit_code(kind: Kind, images: Pixels, limit: int | None = None) -> int | None:
    """Of a process that asks the model once; 77 if onnxruntime said that it failed."""
    process = multiprocessing.get_context("fork").Process(target=_ask_and_exit, args=(kind, images, limit))
    process.start()
    process.join(60)
    return process.exitcode


def _ask_and_exit(kind: Kind, images: Pixels, limit: int | None) -> None:
    faulthandler.disable()  # a crash that is meant needs no stack trace
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = onnxruntime.InferenceSession(graft(onnx.parser.parse_model(SOUND)).SerializeToString(), options)
    try:
        model.run(["logits"], {"image": mark(images, kind)})
    except Exception:
        os._exit(77)
    os._exit(0)
