"""The files of examples/watch for Prometheus: keys, names and thresholds."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from jaxbn import health, writers
from jaxbn.writers import _prometheus
from tests.support.schema import faults

FOLDER = Path(__file__).parents[2] / "examples" / "watch"
LIMITS = health.Limits()
EXPORTED = {f"jaxbn_layer_{name}" for name in _prometheus.HELP} | {"jaxbn_step"}
DURATION = re.compile(r"[1-9]\d*(ms|s|m|h|d|w|y)").fullmatch
RULE = {
    "alert": re.compile(r"Jaxbn[A-Za-z]+").fullmatch,
    "expr": str,
    "for?": DURATION,
    "labels": {"severity": {"warning", "critical"}.__contains__},
    "annotations": {"summary": str, "remedy": str},
}
ALERTS = {"groups": [{"name": str, "rules": [RULE]}]}
PROMETHEUS = {
    "global": {
        "scrape_interval": DURATION,
        "scrape_timeout": DURATION,
        "evaluation_interval": DURATION,
    },
    "rule_files": [str],
    "scrape_configs": [
        {"job_name": str, "static_configs": [{"targets": [str], "labels": {"run": str}}]}
    ],
}
THRESHOLDS = {  # alert → what it holds the figure against
    "JaxbnRunGone": ("==", 0),
    "JaxbnRunStandsStill": ("==", 0),
    "JaxbnNotFinite": (">", 0),
    "JaxbnNegativeVariance": ("<", 0),
    "JaxbnStale": (">", LIMITS.divergence),
    "JaxbnFewValues": ("<", LIMITS.values),
    "JaxbnExplodingScale": (">", LIMITS.exploding),
    "JaxbnExplodingBias": (">", LIMITS.exploding),
    "JaxbnDeadScale": ("<", LIMITS.dead_scale),
    "JaxbnSkewedShards": (">", 1),
    "JaxbnDrift": (">", 0),
}
LINES = {  # figure → the value at which a panel's line is
    "nonfinite": 1,
    "symmetric_kl_max": LIMITS.divergence,
    "symmetric_kl_mean": LIMITS.divergence,
    "batch_count": LIMITS.values,
    "running_var_min": 0,
    "scale_abs_max": LIMITS.exploding,
    "bias_abs_max": LIMITS.exploding,
    "drift_alarm": 1,
}


@pytest.fixture(scope="module")
def alerts():
    return yaml.safe_load((FOLDER / "alerts.yml").read_text())


@pytest.fixture(scope="module")
def rules(alerts):
    return {rule["alert"]: rule for group in alerts["groups"] for rule in group["rules"]}


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((FOLDER / "prometheus.yml").read_text())


def test_the_files_have_the_keys_and_types_that_prometheus_asks_for(alerts, config):
    assert faults(alerts, ALERTS) == []
    assert faults(config, PROMETHEUS) == []
    groups = alerts["groups"]
    assert len({group["name"] for group in groups}) == len(groups)
    assert [rule["alert"] for group in groups for rule in group["rules"]] == list(THRESHOLDS)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("for", "5 minutes", ".for: '5 minutes', expected fullmatch"),
        ("expr", 1, ".expr: 1, expected str"),
        ("severity", "critical", ": 'severity' is unknown"),
    ],
)
def test_a_wrong_key_or_type_of_an_alert_is_found(rules, key, value, fault):
    assert faults(rules["JaxbnDrift"] | {key: value}, RULE) == [fault]


def test_alerts_read_what_is_exported(rules):
    for rule in rules.values():
        read = set(re.findall(r"\b(?:jaxbn_\w+|up)\b", rule["expr"]))
        assert read, rule["expr"]
        assert read <= EXPORTED | {"up"}, rule["expr"]


@pytest.mark.parametrize("alert", THRESHOLDS)
def test_a_threshold_is_that_of_health(rules, alert):
    *_, compared, threshold = rules[alert]["expr"].split()
    assert (compared, float(threshold)) == THRESHOLDS[alert]


def test_an_alert_names_the_run_and_the_layer(alerts):
    for group in alerts["groups"]:
        for rule in group["rules"]:
            named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            assert named == ({"run"} if group["name"] == "jaxbn-run" else {"run", "layer"})


def test_prometheus_scrapes_what_a_writer_serves_by_default(config):
    (job,) = config["scrape_configs"]
    (static,) = job["static_configs"]
    default = inspect.signature(writers.Prometheus).parameters
    assert static["targets"] == [f"{default['address'].default}:{default['port'].default}"]
    assert config["global"]["scrape_timeout"] == f"{_prometheus.PATIENCE:.0f}s"
    assert [(FOLDER / path).is_file() for path in config["rule_files"]] == [True]
    gone = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"][0]
    assert f'job="{job["job_name"]}"' in gone["expr"]


def test_dashboard_and_alerts_call_a_run_by_one_label(config):
    (job,) = config["scrape_configs"]
    labels = set(job["static_configs"][0]["labels"])
    dashboard = (FOLDER / "grafana.json").read_text()
    used = set(re.findall(r"(\w+)=~|{{(\w+)}}", dashboard))
    assert {name for pair in used for name in pair if name} == labels | {"layer", "__name__"}


def test_lines_in_the_dashboard_are_thresholds_of_health():
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    found = {}
    for panel in panels:
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps")
        names = [re.search(r"jaxbn_(?:layer_)?(\w+)", t["expr"])[1] for t in panel["targets"]]
        watched = [name for name in names if name in LINES]
        assert len(watched) == (1 if steps else 0), panel["title"]
        if steps:
            below, above = steps
            assert below["value"] is None
            first = "red" if watched[0] in ("batch_count", "running_var_min") else "green"
            assert {below["color"], above["color"]} == {"red", "green"}
            assert below["color"] == first, panel["title"]
            assert panel["fieldConfig"]["defaults"]["custom"]["thresholdsStyle"]["mode"] == "line"
            found[watched[0]] = above["value"]
    assert found == LINES
