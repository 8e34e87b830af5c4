"""Changes to a valid spec, drawn from the CRD's schema: another value, one more field, one less, a list in another way.

Patterns stand in the schema as CEL rules (see `perch.crd`). They are read back from there, so that most texts get as far as the
rules between fields, and odd texts are mixed in. What the API server makes of the result is not this module's business.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]
Schema = dict[str, Any]

_RULES = "x-kubernetes-validations"
_PATTERN = re.compile(r'self\.matches\(r"(.*)"\)')
_KEYS = re.compile(r'self\.all\(key, key\.matches\(r"(.*)"\)\)')
_FEW = 3
"""Items of a list and keys of a map that are made or looked at: bounds of size have tests of their own."""

ODD_TEXTS = (
    *(
        "",
        " ",
        "\t",
        "a\tb",
        "a\nb",
        "a\x00b",
        "a\x7fb",
        "a\x87b",
        "\u00e9",
        "\U0001f426",
        "\u202e",
        "null",
        "true",
        "0",
        "-1",
        "1e99",
        "0.0",
        "NaN",
    ),
    *("0s", "1s", "99999h", "0h0m0s", "..", ".", "/", "a/b", "*", "{}", "}{", "{{", "{{x}}", "$(HOME)", "localhost", "127.0.0.1"),
    *("http://localhost:9000", "http://127.0.0.1", "http://169.254.169.254", "https://10.0.0.256", "kubernetes.io/hostname"),
    *("::/0", "::ffff:10.0.0.0/104", "10.20.0.7/8", "fd00::/8", "2026-02-31T00:00:00Z", "system-node-critical", "A", "a" * 63),
    *("a" * 253, f"{'a.' * 150}b/c", f"{'a.' * 120}b/c"),
)
ODD_QUANTITIES = (
    0,
    1,
    2**31,
    2**53,
    "0",
    "0m",
    "1m",
    "1",
    "1.5",
    "0.1",
    "1k",
    "1Ki",
    "1Mi",
    "8Gi",
    "1E",
    "8Ei",
    "1n",
    "-1",
    "1e3",
)


@dataclass(frozen=True)
class Change:
    path: Path
    what: str
    value: Any = None

    def __str__(self) -> str:
        value = "" if self.what in ("drop", "twice", "reverse") else f" {json.dumps(self.value)[:200]}"
        return f"{self.what} {'/'.join(map(str, self.path))}{value}"

    def made(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A copy of the spec with this change; the same where another change took its place away."""
        result = copy.deepcopy(spec)
        target: Any = result
        try:
            for part in self.path[:-1]:
                target = target[part]
            last = self.path[-1]
            match self.what:
                case "drop":
                    del target[last]
                case "twice":
                    target[last].append(copy.deepcopy(target[last][0]))
                case "reverse":
                    target[last].reverse()
                case _:
                    target[last] = copy.deepcopy(self.value)
        except (KeyError, IndexError, TypeError):
            return spec
        return result


def changes(schema: Schema, spec: dict[str, Any]) -> st.SearchStrategy[list[Change]]:
    """One change, or two at once."""
    return st.lists(st.sampled_from(list(places(schema, spec))).flatmap(lambda place: _change(*place)), min_size=1, max_size=2)


def places(schema: Schema, value: Any, path: Path = ()) -> Iterator[tuple[Path, Schema, Any]]:
    """Each field below `value`, set or not, with its schema and what it holds now."""
    if isinstance(value, dict):
        below: dict[str, Schema] = schema.get("properties") or dict.fromkeys(list(value)[:_FEW], schema["additionalProperties"])
        children: list[tuple[str | int, Schema, Any]] = [(name, child, value.get(name)) for name, child in below.items()]
    elif isinstance(value, list):
        children = [(place, schema["items"], item) for place, item in enumerate(value[:_FEW])]
    else:
        return
    for name, child, found in children:
        yield (*path, name), child, found
        yield from places(child, found, (*path, name))


def _change(path: Path, schema: Schema, found: Any) -> st.SearchStrategy[Change]:
    ways = [values(schema).map(lambda value: Change(path, "set", value))]
    if found is not None:
        ways.append(st.just(Change(path, "drop")))
    if isinstance(found, list) and found:
        ways += [st.sampled_from(("twice", "reverse")).map(lambda what: Change(path, what))]
    return st.one_of(ways)


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of the schema's type: at its bounds, between them, and odd ones."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return st.sampled_from(ODD_QUANTITIES) | st.sampled_from(ODD_TEXTS)
    match schema.get("type"):
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63 - 1)
            edges = sorted({low, min(low + 1, high), max(high - 1, low), high, max(low, min(2, high))})
            return st.sampled_from(edges) | st.integers(low, high)
        case "string":
            return _texts(schema)
        case "array":
            return st.lists(values(schema["items"]), min_size=min(_FEW, schema.get("minItems", 0)), max_size=_FEW)
        case "object" if "additionalProperties" in schema:
            fitting, odd = _matching(schema, _KEYS), st.sampled_from(ODD_TEXTS)
            keys = odd if fitting is None else fitting | odd
            return st.dictionaries(keys, values(schema["additionalProperties"]), max_size=_FEW)
        case _:
            required = {name: values(child) for name, child in schema["properties"].items() if name in schema.get("required", ())}
            others = {name: values(child) for name, child in schema["properties"].items() if name not in required}
            return st.fixed_dictionaries(required, optional=others)


def _texts(schema: Schema) -> st.SearchStrategy[str]:
    odd = st.sampled_from(ODD_TEXTS)
    longest = st.just("a" * schema["maxLength"])
    fitting = _matching(schema, _PATTERN)
    return st.one_of(odd, longest, fitting) if fitting is not None else st.one_of(odd, longest, st.text(max_size=8))


def _matching(schema: Schema, rule: re.Pattern[str]) -> st.SearchStrategy[str] | None:
    """Texts that match the pattern of the schema's rule, where it has one."""
    found = [match[1] for each in schema.get(_RULES, ()) if (match := rule.fullmatch(each["rule"]))]
    return _from_pattern(found[0], schema.get("maxLength", 317)) if found else None


@cache
def _from_pattern(pattern: str, longest: int) -> st.SearchStrategy[str]:
    # Python's $ also matches before a line break at the end, which RE2's does not.
    return st.from_regex(re.compile(re.sub(r"\$$", r"\\Z", pattern), re.ASCII)).filter(lambda text: len(text) <= longest)
