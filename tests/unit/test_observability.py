"""Metrics: one naming scheme, told in words, bounded in number; and a dashboard and alerts that use what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from services.contracts.runs import IterationMetrics, IterationRecord, RunStatus
from services.generator.app import create_app as create_generator
from services.generator.engine_metrics import own_lines
from services.orchestrator import metrics as orchestrator_metrics
from services.orchestrator.app import create_app as create_orchestrator
from services.orchestrator.settings import OrchestratorSettings
from services.platform.service import create_service
from services.reward.app import create_app as create_reward
from services.reward.settings import RewardSettings
from services.trainer.app import build_app as create_trainer
from services.trainer.settings import TrainerSettings
from tests.fixtures.generator import make_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "ratchet.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
SERVICES = ("orchestrator", "generator", "reward", "trainer")
SUBSYSTEMS = ("build", "service", "http", "jobs", "events", "redis", "run", *SERVICES)
NAME = re.compile(rf"ratchet_({'|'.join(SUBSYSTEMS)})(_[a-z0-9]+)+")
NO_BASE_UNIT = re.compile(
    r"_(ms|millis\w*|micros\w*|minutes|hours|kb|mb|gb|kib|mib|gib|percent|pct|duration|latency)(_|$)"
)
LABELS = {
    "service", "version", "method", "route", "status", "queue", "kind", "outcome", "reason", "client", "run", "stage",
    "scorer", "traffic", "memory", "tracker", "state",
}  # fmt: skip
PROMETHEUS_LABELS = {"job", "instance", "le", "alertname", "alertstate"}


def app(service: str, root: Path) -> Any:
    values: dict[str, Any] = {"token": SecretStr("observability-tests-0123"), "store_url": str(root)}
    if service == "orchestrator":
        return create_orchestrator(OrchestratorSettings(**values))
    if service == "generator":
        return create_generator(make_settings(root))
    if service == "reward":
        return create_reward(RewardSettings(**values, reward_threads=1))
    return create_trainer(TrainerSettings(**values))


async def scraped(service: str, root: Path) -> str:
    transport = httpx.ASGITransport(app=app(service, root))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    return answer.text


def ours(families: Any) -> list[Metric]:
    return [family for family in families if family.name.startswith("ratchet")]


@pytest.mark.parametrize("service", SERVICES)
async def test_every_metric_of_a_service_follows_the_scheme_and_says_what_it_is(service: str, tmp_path: Path) -> None:
    text = await scraped(service, tmp_path)
    families = ours(text_string_to_metric_families(text))
    assert len([family for family in families if family.name.startswith(f"ratchet_{service}_")]) > 5
    for family in families:
        assert NAME.fullmatch(family.name), family.name
        assert not NO_BASE_UNIT.search(family.name), f"{family.name}: base units only"
        assert len(family.documentation.split()) > 1, f"{family.name} has no HELP"
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_tokens", "_bytes", "_sequences")), f"{family.name} has no unit"
        for sample in family.samples:
            assert set(sample.labels) <= LABELS | {"le"}, f"{sample.name}: {sorted(sample.labels)}"
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
    (build,) = [family for family in families if family.name == "ratchet_build_info"]
    told = {sample.labels["service"] for sample in build.samples}
    assert service in told


async def test_readiness_is_measured_at_the_scrape(tmp_path: Path) -> None:
    reason: list[str | None] = ["no policy is loaded"]

    async def ready() -> str | None:
        return reason[0]

    demo = create_service("demo", title="Demo", version="1", ready=ready)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=demo), base_url="http://demo") as client:
        assert 'ratchet_service_ready{service="demo"} 0.0' in (await client.get("/metrics")).text
        reason[0] = None
        assert 'ratchet_service_ready{service="demo"} 1.0' in (await client.get("/metrics")).text


def record(run: str, iteration: int, **figures: Any) -> IterationRecord:
    return IterationRecord(
        run_id=run, iteration=iteration, version="v", incumbent="v", serving="v", decision="promoted", reasons=(),
        metrics=IterationMetrics(**figures), seconds_by_stage={"sample": 2.0}, decided_at="now",
    )  # fmt: skip


def run_samples() -> dict[str, set[str]]:
    """Metric -> the runs it has samples of."""
    found: dict[str, set[str]] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if "run" in sample.labels:
                found.setdefault(sample.name, set()).add(sample.labels["run"])
    return found


def test_runs_are_shown_by_their_last_iteration_and_old_ones_lose_their_series() -> None:
    runs = [f"r{number:02}" for number in range(orchestrator_metrics.RECENT_RUNS + 5)]
    decided = {run: {0: record(run, 0, kl=0.0), 1: record(run, 1, kl=1.5, proxy_reward=0.25)} for run in runs}
    orchestrator_metrics.show_runs(dict.fromkeys(runs, RunStatus.IDLE), decided, dict.fromkeys(runs, 3))
    assert REGISTRY.get_sample_value("ratchet_run_kl_nats", {"run": runs[-1]}) == 1.5
    assert REGISTRY.get_sample_value("ratchet_run_iteration", {"run": runs[-1]}) == 1
    assert REGISTRY.get_sample_value("ratchet_run_status", {"run": runs[-1], "status": "idle"}) == 1
    assert REGISTRY.get_sample_value("ratchet_run_status", {"run": runs[-1], "status": "failed"}) == 0
    assert REGISTRY.get_sample_value("ratchet_orchestrator_runs", {"status": "idle"}) == len(runs)
    # What was not measured has no series, rather than a zero.
    assert "ratchet_run_dpo_loss" not in run_samples()
    for name, shown in run_samples().items():
        assert shown == set(runs[-orchestrator_metrics.RECENT_RUNS :]), name
    orchestrator_metrics.show_runs({"r": RunStatus.FAILED}, {"r": {}}, {"r": 1})
    assert set().union(*run_samples().values()) == {"r"}
    orchestrator_metrics.hide_runs()
    assert run_samples() == {}


def test_dropped_prompts_and_responses_are_counted_apart() -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    names = {
        ("ratchet_orchestrator_prompts_dropped_total", "tie"): 2,
        ("ratchet_orchestrator_responses_dropped_total", "response_truncated"): 5,
    }
    before = {key: value(key[0], reason=key[1]) for key in names}
    prompts = value("ratchet_orchestrator_prompts_total", outcome="dropped")
    orchestrator_metrics.count_pairs(7, {"tie": 2, "response_truncated": 5})
    for key, count in names.items():
        assert value(key[0], reason=key[1]) == before[key] + count
    assert value("ratchet_orchestrator_prompts_total", outcome="dropped") == prompts + 2


def test_of_vllm_s_metrics_only_its_own_are_passed_on() -> None:
    text = (
        "# HELP vllm:kv_cache_usage_perc KV-cache usage.\n# TYPE vllm:kv_cache_usage_perc gauge\n"
        'vllm:kv_cache_usage_perc{model_name="policy"} 0.5\n'
        "# HELP process_cpu_seconds_total CPU.\n# TYPE process_cpu_seconds_total counter\n"
        "process_cpu_seconds_total 1.0\nhttp_requests_total 3\n\n"
    )
    assert list(own_lines(text)) == text.splitlines()[:3]


# --- the dashboard and the alerts


def dashboard_expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


def known_names() -> set[str]:
    """Every name that a sample of ours can have."""
    found: set[str] = set()
    for family in ours(REGISTRY.collect()):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        found |= {family.name + suffix for suffix in suffixes}
    return found


EXPRESSIONS = [*dashboard_expressions(), *(rule["expr"] for rule in rules())]


def test_dashboard_and_alerts_use_only_metrics_that_exist() -> None:
    used = {name for expression in EXPRESSIONS for name in re.findall(r"\bratchet_\w+", expression)}
    assert len(used) > 60
    assert used <= known_names(), sorted(used - known_names())
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    told = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    for name in {name for expression in EXPRESSIONS for name in re.findall(r"vllm:\w+", expression)}:
        assert f'"{name.removesuffix("_total")}"' in told, f"vLLM has no {name}"


def test_dashboard_and_alerts_use_only_labels_that_exist() -> None:
    for expression in EXPRESSIONS:
        grouped = ",".join(re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression))
        matched = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression)
        labels = {label.strip() for label in grouped.split(",") if label.strip()} | set(matched)
        assert labels <= LABELS | PROMETHEUS_LABELS, expression


def test_counters_that_alerts_watch_exist_before_anything_happened() -> None:
    """Prometheus' increase() is 0 for a series that begins with 1."""
    present = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    started = {"ratchet_jobs_dead_lettered_total", "ratchet_reward_invalid_scores_total"}  # with a worker, a scorer
    for rule in rules():
        for name in re.findall(r"increase\((\w+)", rule["expr"]):
            assert name in present | started, name


def test_the_dashboard_has_its_rows_and_takes_its_data_source_from_a_variable() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Loop", "Queue", "Generator", "Reward", "Trainer", "HTTP"]
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        columns, lines = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        cells = {(x, y) for x in columns for y in lines}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_each_alert_says_what_it_means_and_where_to_read_on() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 10
    for rule in rules():
        annotations = rule["annotations"]
        assert annotations["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert len(annotations["description"].split()) > 20, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_prometheus_scrapes_every_service_of_the_compose_file() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    ports = {name: services[name]["environment"]["RATCHET_PORT"] for name in SERVICES}
    assert targets == {name: [f"{name}:{ports[name]}"] for name in SERVICES}
    assert config["rule_files"] == [ALERTS.name]
    added = yaml.safe_load((DEPLOY / "compose.observability.yml").read_text())
    assert set(added["services"]) & set(services) == {"preflight"}, "which looks at the added ports too"
    for service in (added["services"][name] for name in ("prometheus", "grafana")):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "a pinned version"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in added["volumes"] or (ROOT / source).exists(), source
        assert all("127.0.0.1" in port for port in service["ports"])


def test_operations_has_a_section_for_each_alert() -> None:
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert {rule["alert"] for rule in rules()} <= set(headings)
