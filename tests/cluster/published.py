"""Schemas that others publish, for the manifests of cluster/: schemas/README.md. Unknown fields are refused."""

from __future__ import annotations

import functools
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

KUBERNETES = "v1.34.0"  # the oldest that the manifests are for
_FOLDER = f"kubernetes-json-schema/{KUBERNETES}-local-strict"
_WRITTEN = Path(__file__).parent / "schemas"


def problems(manifest: dict[str, Any]) -> list[str]:
    """What the published schema says against a Kubernetes object; each problem with its place."""
    return _found(_validator(manifest["apiVersion"], manifest["kind"]), manifest)


def autoscaler_problems(config: dict[str, Any]) -> list[str]:
    """What Ray's own schema says against a file for `ray up`."""
    return _found(
        Draft202012Validator(json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text())), config
    )


def _found(validator: Draft202012Validator, value: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


@functools.cache
def _validator(api_version: str, kind: str) -> Draft202012Validator:
    if (api_version, kind) in _custom():
        schema = _custom()[api_version, kind]
    else:  # networking.k8s.io/v1 -> networking-v1, as the package names its files
        group, _, version = api_version.rpartition("/")
        name = "-".join(part for part in (kind.lower(), group.split(".")[0], version) if part)
        schema = _kubernetes(f"{name}.json")
    definitions = Resource.from_contents(_kubernetes("_definitions.json"), default_specification=DRAFT202012)
    registry: Registry[Any] = Registry().with_resource("/api/_definitions.json", definitions).crawl()
    return Draft202012Validator(schema, registry=definitions @ registry)


def _kubernetes(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((resources.files("kubernetes_validate") / _FOLDER / name).read_text())
    return content


@functools.cache
def _custom() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> schema of the operators' kinds, from schemas/ or from the CRDs in `MAGICID_CRDS`."""
    found = {}
    if crds := os.environ.get("MAGICID_CRDS"):
        for file in sorted(Path(crds).glob("*.yaml")):
            crd = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
            for version in crd["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = schema
        return found
    versions = {
        "kuberay": "ray.io/v1", "kueue": "kueue.x-k8s.io/v1beta2", "prometheus": "monitoring.coreos.com/v1",
    }  # fmt: skip
    for name, api_version in versions.items():
        written = yaml.safe_load((_WRITTEN / f"{name}.yaml").read_text())
        for kind, spec in written["kinds"].items():
            found[api_version, kind] = {
                "$defs": written["$defs"],
                "type": "object",
                "required": ["metadata", "spec"],
                "additionalProperties": False,
                "properties": {
                    "apiVersion": {"const": api_version},
                    "kind": {"const": kind},
                    "metadata": {
                        "$ref": "/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
                    },
                    "spec": spec,
                },
            }
    return found


def _strict(schema: Any) -> Any:
    """An OpenAPI schema of a CRD as JSON Schema: unknown fields are errors, as for a strict API server."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: _strict(value) for key, value in schema.items() if key not in ("description", "format")}
    if schema.get("x-kubernetes-int-or-string") is True:
        new = {"type": ["integer", "string"]}
    elif isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        new["additionalProperties"] = False
    return new
