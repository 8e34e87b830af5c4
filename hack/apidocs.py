"""Makes docs/api.md from the CRD: a table for each object, with its rules. Run: PYTHONPATH=operator python hack/apidocs.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perch.crd import build_crd

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/api.md"
RULES = "x-kubernetes-validations"

INTRODUCTION = """\
# API reference: ModelDeployment

`serving.perch.dev/v1alpha1`, kind `ModelDeployment`, short name `mdep`. Made from the CRD by `hack/apidocs.py`; do not edit.

`kubectl explain modeldeployment.spec` tells the same in the terminal. Rules are checked when the object is written: what they
refuse is never half applied. Unknown fields are refused by name by every client that asks for strict validation, as kubectl
does by default; a client that does not ask has them pruned by the API server before they are stored.
"""


def render() -> str:
    (version,) = build_crd()["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    parts = [INTRODUCTION, *_listed(schema[RULES])]
    for name in ("spec", "status"):
        for path, node in _objects(name, schema["properties"][name]):
            parts += _section(path, node)
    return "\n".join(parts)


def _objects(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects with fields of their own at and below `path`, each before those within it."""
    if "properties" in node:
        yield path, node
        for name, child in node["properties"].items():
            yield from _objects(f"{path}.{name}", child)
    elif "items" in node:
        yield from _objects(f"{path}[]", node["items"])


def _section(path: str, node: dict[str, Any]) -> list[str]:
    lines = [f"## {path}", ""]
    if "description" in node:
        lines += [node["description"], ""]
    lines += ["| Field | Type | Meaning |", "|---|---|---|"]
    rules = list(node.get(RULES, []))
    required = node.get("required", [])
    for name, child in node["properties"].items():
        needed = " **(required)**" if name in required else ""
        lines.append(f"| `{name}`{needed} | {_type(child)} | {escape(_meaning(child))} |")
        # Rules of objects stand in the objects' own sections.
        for part in (child, child.get("items", {}), child.get("additionalProperties", {})):
            if "properties" not in part:
                rules += [{"message": f"`{name}`: {rule['message']}"} for rule in part.get(RULES, [])]
    return [*lines, "", *_listed(rules)]


def _listed(rules: list[dict[str, Any]]) -> list[str]:
    if not rules:
        return []
    messages = dict.fromkeys(rule["message"] for rule in rules)
    return ["Refused with:", "", *[f"- {escape(message)}" for message in messages], ""]


def _meaning(node: dict[str, Any]) -> str:
    return " ".join(part for part in (node.get("description", ""), _bounds(node)) if part)


def _bounds(node: dict[str, Any]) -> str:
    if "minimum" in node and "maximum" in node:
        return f"From {node['minimum']} to {node['maximum']}."
    if "maxItems" in node:
        return f"{node.get('minItems', 0)} to {node['maxItems']} items."
    if "maxProperties" in node:
        return f"At most {node['maxProperties']} entries."
    return ""


def _type(node: dict[str, Any]) -> str:
    if "x-kubernetes-int-or-string" in node:
        return "quantity"
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    if "items" in node:
        return f"list of {_type(node['items'])}"
    if "additionalProperties" in node:
        return f"map of {_type(node['additionalProperties'])}"
    return str(node["format"]) if node.get("format") == "date-time" else str(node["type"])


def escape(text: str) -> str:
    """Text that Markdown shows as it stands, in cells of tables too."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render())
