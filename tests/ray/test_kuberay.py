"""The manifest of docs/deploy-ray.md, against KubeRay's own definition of a RayService."""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support import docs

CRD = os.environ.get("KUBERAY_CRD")
"""The file ray.io_rayservices.yaml of a KubeRay release; CI fetches one."""


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Of RayService v1; fields that it does not know are errors, as for a strict server."""
    if CRD is None:
        pytest.skip("KUBERAY_CRD is not set")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(Path(CRD).read_text(), Loader=loader)["spec"]["versions"]
    (found,) = (each for each in versions if each["name"] == "v1")
    made: dict[str, Any] = strict(found["schema"]["openAPIV3Schema"])
    return made


def strict(schema: Any) -> Any:
    """`schema` without room for fields that have no property of their own."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("pattern", None)
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def manifest() -> dict[str, Any]:
    """As the page has it."""
    (block,) = docs.blocks(docs.ROOT / "docs/deploy-ray.md", "yaml")
    loaded: dict[str, Any] = yaml.safe_load(block.text)
    return loaded


def test_the_manifest_is_valid(schema: dict[str, Any]) -> None:
    jsonschema.validate(manifest(), schema | {"additionalProperties": True})


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("spec", {"serveConfigV3": "x"}),
        ("spec.rayClusterConfig", {"enableInTreeAutoscaling": "yes"}),
        ("spec.rayClusterConfig.headGroupSpec.template.spec", {"serviceLinks": False}),
    ],
)
def test_what_is_wrong_is_seen(schema: dict[str, Any], where: str, wrong: dict[str, Any]) -> None:
    """Else the test above would prove nothing."""
    broken = place = manifest()
    for name in where.split("."):
        place = place[name]
    place |= wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema | {"additionalProperties": True})
