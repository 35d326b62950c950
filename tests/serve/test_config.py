"""What is shipped for clusters fits the code: the Serve config file and the dashboard."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from magicid import recipe
from magicid.errors import RecipeError
from serve import metrics, settings
from serve.app import app
from tests.ray_jobs.job import ROOT


def test_the_serve_config_builds_the_application() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve/config.yaml").read_text()))
    (application,) = config.applications
    assert application.import_path == "serve.app:app"
    loaded = settings.load(application.args)
    assert loaded.recipe in recipe.shipped()
    assert app(application.args) is not None


@pytest.mark.parametrize(
    ("values", "named"),
    [({"max_bach": "4"}, "max_bach"), ({"max_batch": "0"}, "max_batch"), ({"drain_s": "x"}, "drain_s")],
)
def test_a_wrong_setting_is_named(values: dict[str, str], named: str) -> None:
    with pytest.raises(RecipeError, match=rf"endpoint setting {named}:"):
        settings.load(values)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((ROOT / "cluster/grafana/magicid.json").read_text())
    asked = set(re.findall(r"magicid_\w+", " ".join(t["expr"] for panel in board["panels"] for t in panel["targets"])))
    source = (ROOT / "serve/metrics.py").read_text()
    known = set(re.findall(r"\"(magicid_\w+?)\"", source)) | {
        f"magicid_cache_{n}" for n in ("hits", "misses", "evictions")
    }
    bare = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked}
    assert bare <= known
    assert len(bare) >= 10
    assert metrics.queue_metrics is not None
