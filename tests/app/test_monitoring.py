"""The dashboard and the alert rules name what klein measures; `make test-metrics` runs them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from klein.app.account import OUTCOMES
from klein.app.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "docs/monitoring"
ALERTS = FOLDER / "alerts.yml"
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
SERIES = {row.name + suffix: row for row in METRICS for suffix in SUFFIXES[row.kind]}
BENTOMLS = {"bentoml_service_request_total"}
FROM_PROMETHEUS = {"instance", "job", "le", "alertname"}


def dashboard() -> dict[str, Any]:
    """Grafana's JSON."""
    found: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())
    return found


def dashboard_queries(instance: str = ".*") -> Iterator[tuple[str, str]]:
    """The title and each query of every panel, for the instances that match."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$instance", instance)


def rules() -> Iterator[tuple[str, str]]:
    """Name and query of each alert."""
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def test_they_name_metrics_and_labels_that_exist() -> None:
    """With the suffix that Prometheus gives each kind, and outcomes that klein tells."""
    queries = [*dashboard_queries(), *rules()]
    assert len(queries) > 30
    queries.append(("its variables", json.dumps(dashboard()["templating"])))
    for name, query in queries:
        series = set(re.findall(r"\b(?:klein|bentoml)_\w+", query)) - BENTOMLS
        assert series <= SERIES.keys(), (name, series - SERIES.keys())
        for metric, matchers in re.findall(r"\b(klein_\w+)\{(.*?)\}", query):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
            assert labels <= {*SERIES[metric].labels, *FROM_PROMETHEUS}, (name, labels)
        for outcomes in re.findall(r'outcome(?:=~|!=|=)"(.*?)"', query):
            assert set(outcomes.split("|")) <= set(OUTCOMES), (name, outcomes)


def test_every_metric_is_on_the_dashboard() -> None:
    """What is measured can be seen."""
    shown = " ".join(query for _, query in dashboard_queries())
    missing = {row.name for row in METRICS if f"{row.name}" not in shown}
    assert not missing
