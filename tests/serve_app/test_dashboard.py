"""What operators import asks for what there is."""

import json
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from deployments.metrics import METRICS, Metric
from serve_app.dashboard import dashboard

CONFIG = Path(__file__).resolve().parents[2] / "serve_app" / "config"
PROMETHEUS_OWN = {"up": {"job", "instance"}}
VARIABLES = {"$__rate_interval": "5m", "$model": ".*"}


def rules() -> dict[str, str]:
    groups = yaml.safe_load((CONFIG / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def panels() -> dict[str, str]:
    found = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


EXPRESSIONS = rules() | panels()


def exposed(metric: Metric) -> dict[str, set[str]]:
    """Names of its series and their labels."""
    labels = set(metric.labels)
    if metric.kind != "histogram":
        return {metric.name: labels}
    return {
        f"{metric.name}_bucket": labels | {"le"},
        f"{metric.name}_sum": labels,
        f"{metric.name}_count": labels,
    }


SERIES = PROMETHEUS_OWN | {name: labels for metric in METRICS for name, labels in exposed(metric).items()}


def selectors(expression: str) -> list[Any]:
    found = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):  # a range's is visited as well
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_selects_series_that_exist_by_labels_that_they_have(name: str) -> None:
    chosen = selectors(EXPRESSIONS[name])
    assert chosen
    for selector in chosen:
        assert selector.name in SERIES, selector.name
        assert {matcher.name for matcher in selector.matchers.matchers} <= SERIES[selector.name]


def test_a_name_that_does_not_exist_would_be_noticed() -> None:
    assert [each.name for each in selectors("sum(rate(dream_typo_total[5m])) / max(dream_part_up)")] == [
        "dream_typo_total",
        "dream_part_up",
    ]


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {selector.name for expression in panels().values() for selector in selectors(expression)}
    assert [metric.name for metric in METRICS if not shown & exposed(metric).keys()] == []


def test_the_dashboard_in_the_repository_is_the_one_that_is_made() -> None:
    assert json.loads((CONFIG / "dashboard.json").read_text()) == dashboard()


def test_panels_do_not_cover_each_other() -> None:
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
