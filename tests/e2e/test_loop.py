"""The whole loop through the public HTTP APIs: train, two iterations, a served policy; with every part real."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import openai
import pytest

from examples.tiny_world.build import BuildSettings, build
from examples.tiny_world.files import BuiltWorld
from ratchet.client import RatchetClient
from ratchet.local.stack import LocalStack, StackSettings

pytestmark = pytest.mark.timeout(900)

READY_SECONDS = 300.0
JOB_SECONDS = 300.0
RUN_SECONDS = 600.0
PROMPTS, HELDOUT, N = 16, 24, 4
SMALL = BuildSettings(
    hidden_size=64, attention_heads=2, layers=2, intermediate_size=128, vocabulary_size=512, sft_samples=600,
    preference_pairs=300, held_out_preference_pairs=40, loop_prompts=64, held_out_prompts=HELDOUT,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> BuiltWorld:
    return build(tmp_path_factory.mktemp("world"), settings=SMALL)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    settings = StackSettings(environment={"RATCHET_GENERATOR_DTYPE": "float32"})
    with LocalStack(tmp_path_factory.mktemp("stack"), settings) as running:
        running.wait_ready(READY_SECONDS)
        yield running


class Api:
    """The four services over plain HTTP, as curl would speak to them."""

    def __init__(self, stack: LocalStack) -> None:
        token = stack.files.saved_token()
        self.token = token or ""
        headers = {"Authorization": f"Bearer {token}"}
        self.services = {
            name: httpx.Client(base_url=stack.record.url(name) or "", headers=headers, timeout=60, trust_env=False)
            for name in ("generator", "reward", "trainer", "orchestrator")
        }

    def __call__(self, service: str, method: str, path: str, **options: Any) -> Any:
        answer = self.services[service].request(method, path, **options)
        assert answer.status_code < 400, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def job(self, body: dict[str, Any]) -> dict[str, Any]:
        """Submit a training job and wait for its end."""
        submitted = self("trainer", "POST", "/v1/jobs", json=body)
        deadline = time.monotonic() + JOB_SECONDS
        while time.monotonic() < deadline:
            job = self("trainer", "GET", f"/v1/jobs/{submitted['id']}")
            if job["state"] in ("succeeded", "failed", "cancelled"):
                assert job["state"] == "succeeded", job
                return job
            time.sleep(0.3)
        raise AssertionError(f"{submitted['id']} did not end within {JOB_SECONDS} s")

    def upload(self, path: Path, kind: str) -> str:
        """Upload a data file; its store path."""
        return self(
            "orchestrator", "POST", "/v1/datasets", params={"kind": kind, "format": "jsonl"}, content=path.read_bytes()
        )["path"]

    def run_ends(self, run: str, decided: int) -> dict[str, Any]:
        """Wait until so many iterations (the baseline not counted) are decided and the run is idle."""
        deadline = time.monotonic() + RUN_SECONDS
        view: dict[str, Any] = {}
        while time.monotonic() < deadline:
            view = self("orchestrator", "GET", f"/v1/runs/{run}")
            assert view["status"] not in ("failed", "cancelled"), view["problem"]
            if view["status"] == "idle" and view["iterations_decided"] >= decided:
                return view
            time.sleep(0.5)
        raise AssertionError(f"run {run} did not end within {RUN_SECONDS} s: {json.dumps(view)[:2000]}")


@pytest.fixture(scope="module")
def api(stack: LocalStack) -> Api:
    return Api(stack)


@pytest.fixture(scope="module")
def models(api: Api, stack: LocalStack, world: BuiltWorld) -> tuple[str, str]:
    """SFT and reward model, trained from scratch by the trainer service."""
    with RatchetClient.from_stack(stack.files.path) as client:
        source = client.stage_model(world.base)  # the one thing that is put into the store and not sent
    common = {"train_batch_size": 32, "max_length": 128}
    base = {"kind": "import_model", "model_kind": "policy", "source": f"store:{source}", "output": "models/base"}
    api.job(base)
    sft_config = common | {"learning_rate": 4e-3, "num_train_epochs": 2}
    sft = {"kind": "sft", "start": "models/base", "data": api.upload(world.sft, "any"), "config": sft_config}
    job = api.job(sft | {"output": "models/sft"})
    assert job["result"]["checkpoint"] == "models/sft"
    reward_config = common | {"learning_rate": 1e-3, "num_train_epochs": 1}
    data = {"data": api.upload(world.preferences, "any"), "heldout": api.upload(world.preferences_heldout, "any")}
    api.job({"kind": "reward_model", "start": "models/sft", "config": reward_config, "output": "models/rm"} | data)
    return "models/sft", "models/rm"


@pytest.fixture(scope="module")
def recipe(api: Api, world: BuiltWorld, models: tuple[str, str]) -> dict[str, Any]:
    return {
        "name": "e2e",
        "policy": models[0],
        "reward_model": models[1],
        "iterations": 1,
        "prompts": {"path": api.upload(world.prompts, "prompts")},
        "heldout": {"path": api.upload(world.heldout, "prompts")},
        "sampling": {
            "prompts_per_iteration": PROMPTS,
            "chunk_size": 8,
            "max_tokens": 48,
            "groups": [{"n": 2, "temperature": 1.0}, {"n": 2, "temperature": 0.7}],
        },
        "dpo": {"learning_rate": 5e-5, "train_batch_size": 8, "max_length": 160, "num_train_epochs": 1},
        "evaluation": {"max_prompts": HELDOUT, "chunk_size": 12},
        "gate": {"alpha": 0.5, "min_improvement": -100.0},
    }


@pytest.fixture(scope="module")
def run(api: Api, recipe: dict[str, Any]) -> dict[str, Any]:
    """A run of two iterations: one asked for when it is created, one triggered afterwards."""
    body = {"id": "e2e", "recipe": recipe}
    assert api("orchestrator", "POST", "/v1/runs", json=body)["id"] == "e2e"
    assert api("orchestrator", "POST", "/v1/runs", json=body)["id"] == "e2e"  # the same run, not a second one
    api.run_ends("e2e", 1)
    api("orchestrator", "POST", "/v1/runs/e2e/iterations", json={"count": 1})
    return api.run_ends("e2e", 2)


def test_two_iterations_through_the_public_apis(api: Api, run: dict[str, Any]) -> None:
    records = [it["record"] for it in run["iterations"]]
    assert [r["iteration"] for r in records] == [0, 1, 2]
    assert records[0]["decision"] == "baseline"
    assert all(r["decision"] in ("promoted", "rejected") and r["reasons"] for r in records[1:])
    for record in records[1:]:
        metrics = record["metrics"]
        assert metrics["prompts"] == PROMPTS
        assert metrics["responses"] == PROMPTS * N
        assert 0 < metrics["pairs"] <= PROMPTS
        assert metrics["kl"] is not None
        assert metrics["dpo_loss"] > 0
        assert {"sample", "score", "train", "load", "evaluate", "decide"} <= set(record["seconds_by_stage"])

    policy = api("generator", "GET", "/v1/policy")
    assert policy["state"] == "serving"
    assert policy["version"] == records[-1]["serving"] == run["incumbent"]
    assert policy["engine_starts"] == 1, "a swap never restarts vLLM"


def test_the_store_holds_each_prompt_exactly_once_and_one_version(stack: LocalStack, run: dict[str, Any]) -> None:
    incumbents = [it["record"]["incumbent"] for it in run["iterations"]]
    for iteration in (1, 2):
        folder = Path(stack.record.store_url) / f"runs/e2e/iter-{iteration}"
        drawn = datasets.load_dataset("parquet", data_files=str(folder / "prompts.parquet"), split="train")
        rollouts = datasets.load_dataset("parquet", data_files=str(folder / "rollouts/*.parquet"), split="train")
        scores = datasets.load_dataset("parquet", data_files=str(folder / "scores/*.parquet"), split="train")
        assert len(set(drawn["id"])) == PROMPTS
        assert sorted(rollouts["prompt_id"]) == sorted(drawn["id"]) == sorted(scores["prompt_id"])
        assert set(rollouts["policy_version"]) == {incumbents[iteration]}
        assert all(len(row) == N for row in rollouts["responses"])


@pytest.mark.usefixtures("run")
def test_the_pairs_train_in_stock_trl_as_they_are(stack: LocalStack, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    store = Path(stack.record.store_url)
    pairs = datasets.load_dataset("parquet", data_files=str(store / "runs/e2e/iter-1/pairs.parquet"), split="train")
    assert {"prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "margin"} <= set(
        pairs.column_names
    )
    conversational = pairs.select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(store / "models/sft"),
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", bf16=False
        ),
        train_dataset=conversational,
        processing_class=AutoTokenizer.from_pretrained(store / "models/sft"),
    )
    assert trainer.train().training_loss > 0


@pytest.mark.usefixtures("run")
def test_the_official_openai_client_works_unchanged(api: Api, stack: LocalStack) -> None:
    client = openai.OpenAI(base_url=f"{stack.record.url('generator')}/v1", api_key=api.token)
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": "What is the capital of this town?"}]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=8)
    assert raw.headers["x-policy-version"] == api("generator", "GET", "/v1/policy")["version"]
    assert raw.parse().choices[0].message.content is not None
    pieces = client.chat.completions.create(model=model, messages=messages, max_tokens=8, stream=True)
    assert sum(1 for piece in pieces if piece.choices) >= 1
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=messages)


@pytest.mark.usefixtures("run")
def test_scores_are_raw_and_those_of_the_trained_model(api: Api, world: BuiltWorld) -> None:
    row = json.loads(world.preferences_heldout.read_text().splitlines()[0])
    item = {"messages": row["prompt"], "responses": [row["chosen"][0]["content"], row["rejected"][0]["content"]]}
    answer = api("reward", "POST", "/v1/score", json={"items": [item]})
    assert answer["revision"] == "models/rm"
    assert len(answer["scores"][0]) == 2
    assert answer["scores"][0][0] != answer["scores"][0][1]


@pytest.mark.usefixtures("run")
def test_the_event_stream_tells_the_whole_history(api: Api) -> None:
    kinds: list[str] = []
    with api.services["orchestrator"].stream("GET", "/v1/runs/e2e/events", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data:"):
                kinds.append(json.loads(line[5:])["type"])
                if kinds.count("iteration.decided") == 3:
                    break
    assert {"job.started", "job.progress", "job.succeeded", "iteration.decided"} <= set(kinds)


@pytest.mark.usefixtures("run")
def test_control_routes_need_the_token_and_vllm_s_own_are_not_reachable(stack: LocalStack) -> None:
    with httpx.Client(base_url=stack.record.url("generator") or "", trust_env=False) as anonymous:
        assert anonymous.put("/v1/policy", json={"checkpoint": "models/sft"}).status_code == 401
        assert anonymous.post("/collective_rpc", json={"method": "sleep"}).status_code in (404, 405)
        assert anonymous.post("/reset_prefix_cache").status_code in (404, 405)
    with httpx.Client(base_url=stack.record.url("orchestrator") or "", trust_env=False) as anonymous:
        refused = anonymous.post("/v1/runs/e2e/iterations", json={"count": 1})
        assert refused.status_code == 401
        assert refused.headers["content-type"] == "application/problem+json"
