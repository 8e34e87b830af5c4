"""As much of the CUDA runtime as running a plan takes, by ctypes: no Python package for it comes with every TensorRT image."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from perch_exporter.contract import Reason
from perch_exporter.failure import StepFailed
from perch_exporter.samples import Array

_LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")
_TO_DEVICE, _TO_HOST = 1, 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class Cuda:
    def __init__(self, library: Any) -> None:
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    @classmethod
    def load(cls) -> Cuda:
        for name in _LIBRARIES:
            try:
                return cls(ctypes.CDLL(name))
            except OSError:
                continue
        raise StepFailed(
            Reason.EXPORT_FAILED, f"builder.tensorrtImage has no CUDA runtime: none of {', '.join(_LIBRARIES)} loads"
        )

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            words = self._library.cudaGetErrorString(code).decode(errors="replace")
            hint = "; does builder.resources.limits have nvidia.com/gpu?" if name == "cudaDeviceGetAttribute" else ""
            raise StepFailed(Reason.EXPORT_FAILED, f"CUDA: {name} failed: {words}{hint}")

    def compute_capability(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        for place, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
            self.call("cudaDeviceGetAttribute", ctypes.byref(place), attribute, 0)
        return f"{major.value}.{minor.value}"

    @contextmanager
    def memory(self) -> Iterator[Memory]:
        memory = Memory(self)
        try:
            yield memory
        finally:
            memory.free()


class Memory:
    """Device memory of one run, and its stream; freed together."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._places: list[int] = []
        stream = ctypes.c_void_p()
        cuda.call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = stream.value or 0

    def allocate(self, size: int) -> int:
        place = ctypes.c_void_p()
        self._cuda.call("cudaMalloc", ctypes.byref(place), ctypes.c_size_t(size))
        self._places.append(place.value or 0)
        return self._places[-1]

    def upload(self, array: Array) -> int:
        place = self.allocate(array.nbytes)
        self._copy(ctypes.c_void_p(place), array.ctypes.data_as(ctypes.c_void_p), array.nbytes, _TO_DEVICE)
        return place

    def download(self, place: int, shape: Sequence[int], data_type: np.dtype[Any]) -> Array:
        array = np.empty(shape, data_type)
        self._copy(array.ctypes.data_as(ctypes.c_void_p), ctypes.c_void_p(place), array.nbytes, _TO_HOST)
        return array

    def _copy(self, target: Any, source: Any, size: int, direction: int) -> None:
        self._cuda.call("cudaMemcpy", target, source, ctypes.c_size_t(size), direction)

    def wait(self) -> None:
        self._cuda.call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def free(self) -> None:
        for place in self._places:
            self._cuda.call("cudaFree", ctypes.c_void_p(place))
        self._cuda.call("cudaStreamDestroy", ctypes.c_void_p(self.stream))
