"""The dashboard asks for nothing that is not there, and shows everything that is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from stages.telemetry import METRICS
from tests.infra.conftest import INFRA, read_yaml

DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana" / "darkroom.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
OURS = {f"ray_{name}{suffix}": name for name, (kind, _, _) in METRICS.items() for suffix in SUFFIXES[kind]}


def asked() -> set[str]:
    return {name for expression in EXPRESSIONS for name in re.findall(r"\bray_[a-z_]+", expression)}


def test_every_metric_that_it_asks_for_is_told_by_the_code_or_by_ray():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    rays = {f"ray_{name}" for name in METRICS_GAUGES}
    assert asked() - OURS.keys() <= rays
    assert len(asked() - OURS.keys()) == 4


def test_every_metric_of_the_code_is_shown():
    assert {OURS[name] for name in asked() & OURS.keys()} == METRICS.keys()


def test_every_label_that_it_uses_is_a_tag_of_its_metric():
    for expression in EXPRESSIONS:
        for name, selector in re.findall(r"(ray_darkroom_[a-z_]+)\{([^}]*)\}", expression):
            kind, _, tags = METRICS[OURS[name]]
            labels = set(re.findall(r"(\w+)\s*[!=]?=~?", selector))
            assert labels <= {"run", "stage", *tags}, expression
            (grouped,) = re.findall(r"by \(([^)]*)\)", expression) or [""]
            extra = {"le"} if kind == "histogram" else set()
            assert set(re.findall(r"\w+", grouped)) <= {"run", "stage", *tags, *extra}, expression


def test_a_counter_is_looked_at_by_its_growth_and_a_gauge_by_its_value():
    for expression in EXPRESSIONS:
        grows = bool(re.search(r"\b(rate|increase)\(", expression))
        assert grows == bool(re.search(r"_(total|bucket)\b", expression.replace("mem_total", ""))), expression


def test_panels_do_not_overlap_and_ask_the_provisioned_source():
    source = read_yaml(INFRA / "grafana" / "datasource.yml")["datasources"][0]
    places = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & places and at["x"] + at["w"] <= 24
        places |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("service", ["ray-head", "ray-worker"])
def test_prometheus_scrapes_the_port_that_ray_is_told_to_use(compose, service):
    (job,) = read_yaml(INFRA / "grafana" / "prometheus.yml")["scrape_configs"]
    targets = job["static_configs"][0]["targets"]
    (option,) = [o for o in compose["services"][service]["command"] if o.startswith("--metrics-export-port=")]
    assert f"{service}:{option.partition('=')[2]}" in targets
