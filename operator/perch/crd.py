"""Makes the CustomResourceDefinition from the types in `api`: `python -m perch.crd` prints the file that the chart ships.

Pydantic's JSON schema is turned into a structural one: references inlined, nullable unions flattened, titles and defaults
dropped (defaults belong to the operator: a server-side default would show up as drift to GitOps tools).
"""

from __future__ import annotations

from typing import Any

import yaml

from perch.api import GROUP, KIND, PLURAL, VERSION, Spec, Status

_DROP = ("title", "default", "$defs", "propertyNames")
_RULES = "x-kubernetes-validations"

_COLUMNS = (
    ("Ready", "string", ".status.conditions[?(@.type=='Ready')].status", 0),
    ("Stable", "integer", ".status.stable", 0),
    ("Canary", "integer", ".status.canary", 0),
    ("Weight", "integer", ".status.canaryWeight", 0),
    ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Endpoint", "string", ".status.endpoint", 1),
    ("Artifact", "string", ".status.artifact", 1),
)

_NAME_RULE = {
    "rule": "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    "message": "metadata.name names Services too: at most 40 characters, lower-case letters, digits and '-', "
    "beginning with a letter; choose another name (modelName may differ from it)",
}


def _structural(schema: Any, defs: dict[str, Any]) -> Any:
    """Return `schema` as a structural schema, with references into `defs` inlined."""
    if isinstance(schema, list):
        return [_structural(item, defs) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = _structural(defs[schema["$ref"].rsplit("/", 1)[-1]], defs)
        return _merge(target, _structural({k: v for k, v in schema.items() if k != "$ref"}, defs))
    if "anyOf" in schema and "x-kubernetes-int-or-string" not in schema:
        (member,) = [m for m in schema["anyOf"] if m.get("type") != "null"]
        outer = {k: v for k, v in schema.items() if k != "anyOf"}
        return _structural(_merge(member, outer), defs)
    out: dict[str, Any] = {}
    for key, value in _explained(schema).items():
        if key == "const":
            out["enum"] = [value]
        elif key == "properties":
            out[key] = {name: _structural(prop, defs) for name, prop in value.items()}
        elif key == "additionalProperties":
            if isinstance(value, dict):
                out[key] = _structural(value, defs)
        elif key not in _DROP:
            out[key] = _structural(value, defs)
    return out


def _merge(inner: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """What a field says goes before what its type says, but the rules of both hold."""
    merged = {**inner, **outer}
    if _RULES in inner and _RULES in outer:
        merged[_RULES] = [*inner[_RULES], *outer[_RULES]]
    return merged


def _explained(schema: dict[str, Any]) -> dict[str, Any]:
    """Turn patterns that carry a message (`x-refusal`) into CEL rules, those of a map's keys included.

    A pattern in the schema would be refused with the bare regular expression, and a structural schema knows no pattern for
    keys at all. Both engines are RE2 dialects, so pydantic (Rust) and the API server (Go) read them alike.
    """
    out = dict(schema)
    rules = []
    if "x-refusal" in out:
        rules.append({"rule": f"self.matches({_literal(out.pop('pattern'))})", "message": out.pop("x-refusal")})
    if "patternProperties" in out:
        ((pattern, out["additionalProperties"]),) = out.pop("patternProperties").items()
        refusal = out["propertyNames"]["x-refusal"]
        rules.append({"rule": f"self.all(key, key.matches({_literal(pattern)}))", "message": f"in each key {refusal}"})
    if rules:
        out[_RULES] = [*rules, *out.get(_RULES, [])]
    return out


def _literal(pattern: str) -> str:
    """The pattern as a raw string of CEL, where backslashes stand for themselves."""
    if '"' in pattern:
        raise ValueError(f"{pattern} cannot stand in a raw string")
    return f'r"{pattern}"'


def build_schema(model: type[Spec] | type[Status]) -> dict[str, Any]:
    raw = model.model_json_schema(by_alias=True)
    schema: dict[str, Any] = _structural(raw, raw.get("$defs", {}))
    return schema


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition as a plain dict, ready for YAML."""
    status = build_schema(Status)
    status["properties"]["conditions"].update({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]})
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["mdep"],
                "categories": ["all", "perch"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority}
                        for name, kind, path, priority in _COLUMNS
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "description": "One model: its versions, which of them serve, and how the traffic is split.",
                            "type": "object",
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
                                "kind": {"type": "string", "description": KIND},
                                "metadata": {"type": "object"},
                                "spec": build_schema(Spec),
                                "status": status,
                            },
                            "x-kubernetes-validations": [_NAME_RULE],
                        }
                    },
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def render() -> str:
    return yaml.dump(build_crd(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    print(render(), end="")
