"""What a generator with a real vLLM tells: vLLM's metrics beside its own, and one JSON line for each prompt."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.contracts.tracing import prompt_trace_id
from tests.fixtures.generator import lines_of, prompts, rollout_body
from tests.fixtures.real_generator import RealGenerator

pytestmark = pytest.mark.timeout(900)
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "ratchet.json"


def test_vllm_s_metrics_are_passed_on_and_a_prompt_is_logged_under_its_trace(real_generator: RealGenerator) -> None:
    info = real_generator.ensure("a")
    assert info.version is not None
    asked = tuple(
        prompt.model_copy(update={"trace_id": prompt_trace_id("observed", 1, prompt.id)}) for prompt in prompts(3)
    )
    body = rollout_body(info.version, asked)
    answer = real_generator.client.post(f"{real_generator.url}/v1/rollouts", json=body)
    assert {line.rollout.trace_id for line in lines_of(answer) if line.rollout} == {p.trace_id for p in asked}

    text = real_generator.client.get(f"{real_generator.url}/metrics").text
    names = Counter(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert max(names.values()) == 1, "a metric is there twice, and Prometheus would refuse the scrape"
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["ratchet_generator_rollout_tokens"].samples[0].value > 0
    assert families["vllm:generation_tokens"].samples[0].value > 0
    shown = {re.sub("_total$", "", name) for name in re.findall(r"vllm:\w+", DASHBOARD.read_text())}
    assert shown <= set(families)

    log = (real_generator.folder / "gateway.log").read_text(errors="replace").splitlines()
    lines = [json.loads(line) for line in log if line.startswith("{")]  # vLLM's own lines are not JSON
    sampled = [line for line in lines if line["event"] == "prompt_sampled" and line["service"] == "generator"]
    assert {p.trace_id for p in asked} <= {line["trace_id"] for line in sampled}
