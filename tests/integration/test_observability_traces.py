"""One prompt, followed by its trace id from its draw to its pair, through the logs of three services.

Orchestrator, the generator's gateway and the reward service are the real ones, in one process; only vLLM and the
scorer's model are stand-ins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr
from redis.asyncio import Redis

from ratchet.local.redis_server import RedisServer
from services.contracts import layout
from services.contracts.pairs import Pair
from services.contracts.scores import ScoreItem, ScorerInfo, ScorerSpec
from services.contracts.tracing import derived_trace_id, prompt_trace_id
from services.generator.app import create_app as create_generator
from services.orchestrator.app import create_app as create_orchestrator
from services.orchestrator.settings import OrchestratorSettings
from services.platform.store import ArtifactStore
from services.platform.tables import read_rows
from services.reward.app import create_app as create_reward
from services.reward.bradley_terry import BradleyTerryScorer
from services.reward.scorers import TokenSequence
from services.reward.settings import RewardSettings
from tests.fixtures.fake_services import publish_checkpoint
from tests.fixtures.fake_vllm import FakeEngines, StreamingTransport
from tests.fixtures.generator import fake_policy, make_settings
from tests.fixtures.logs import JsonLogs, json_logs
from tests.fixtures.orchestrator_stack import JOBS, TOKEN, Stack, recipe

__all__ = ["json_logs"]
REQUEST_ID = "who-asked-for-this"


class CountingScorer(BradleyTerryScorer):
    """Every response gets another reward."""

    def __init__(self, name: str, spec: ScorerSpec) -> None:
        info = ScorerInfo(
            name=name, spec=spec, revision=layout.version_of(spec.checkpoint), template_hash="t", parameters=0,
            dtype="float32", proofs={},
        )  # fmt: skip
        super().__init__(None, None, 0, info)  # pyright: ignore[reportArgumentType]
        self.count = 0

    def prepare(self, items: Sequence[ScoreItem]) -> list[TokenSequence]:
        return [
            TokenSequence([1], f"items.{i}.responses.{j}")
            for i, item in enumerate(items)
            for j in range(len(item.responses))
        ]

    def evaluate(self, sequences: Sequence[TokenSequence]) -> list[float]:
        self.count += len(sequences)
        return [float(self.count - index) for index in range(len(sequences))]


class RealStack(Stack):
    """Real services but for vLLM and the reward model; no trainer, so a run stops when its pairs are made."""

    def __init__(self, root: Path, redis_url: str) -> None:
        self.root = root
        self.store = ArtifactStore(str(root / "store"))
        self.redis_url = redis_url
        fake_policy(root / "store", "policy", seed=1)
        publish_checkpoint(self.store, "models/reward", "reward_model")

    async def up(self, resources: AsyncExitStack) -> None:
        ours = make_settings(self.root / "store").model_copy(update={"token": SecretStr(TOKEN)})
        generator = create_generator(ours, FakeEngines().start)
        reward = create_reward(RewardSettings(token=SecretStr(TOKEN), store_url=self.store.url, reward_threads=1))
        reward.state.registry._load = CountingScorer
        settings: dict[str, Any] = {"sweep_seconds": 0.3, "wait_pause_seconds": 0.02, "lease_seconds": 1.0}
        self.app = create_orchestrator(
            OrchestratorSettings(
                token=SecretStr(TOKEN), store_url=self.store.url, redis_url=self.redis_url, **settings
            ),
            job_settings=JOBS, generator=StreamingTransport(generator), reward=httpx.ASGITransport(app=reward),
        )  # fmt: skip
        for app in (generator, reward, self.app):
            await resources.enter_async_context(app.router.lifespan_context(app))
        self.http = await resources.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://test", timeout=60)
        )


async def test_a_prompt_is_followed_from_its_draw_to_its_pair(
    redis_server: RedisServer, redis_client: Redis, tmp_path: Path, json_logs: JsonLogs
) -> None:
    async with AsyncExitStack() as resources:
        stack = RealStack(tmp_path, redis_server.url)
        await stack.up(resources)
        prompts, heldout = await stack.upload(24), await stack.upload(6, 1000)
        asked = recipe(
            prompts, heldout, policy="models/policy",
            evaluation={"max_prompts": 6, "chunk_size": 4, "measure_kl": False},
            sampling={"prompts_per_iteration": 10, "chunk_size": 4, "max_tokens": 24,
                      "groups": [{"n": 2, "temperature": 1.0}, {"n": 1, "temperature": 0.7}]},
        )  # fmt: skip
        answer = await stack.http.post(
            "/v1/runs", json={"id": "r", "recipe": asked.model_dump(mode="json")},
            headers={"Authorization": f"Bearer {TOKEN}", "X-Request-Id": REQUEST_ID},
        )  # fmt: skip
        assert answer.status_code == 201, answer.text
        await stack.eventually(lambda: stack.store.exists(layout.pairs_file("r", 1)))
    lines = json_logs.lines()

    pairs = read_rows(stack.store, layout.pairs_file("r", 1), Pair)
    drawn = {line["prompt_id"]: line for line in lines if line["event"] == "prompt_drawn"}
    assert len(drawn) == 10
    assert 0 < len(pairs) < 10, "the test wants prompts of both fates"
    assert {pair.trace_id for pair in pairs} <= {line["trace_id"] for line in drawn.values()}

    by_trace: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if "trace_id" in line:
            by_trace[line["trace_id"]].append(line["event"])
    fates = {pair.prompt_id: "pair_made" for pair in pairs}
    for prompt_id, line in drawn.items():
        assert line["trace_id"] == prompt_trace_id("r", 1, prompt_id)
        stages = [event for event in by_trace[line["trace_id"]] if event.startswith(("prompt_", "pair_"))]
        assert stages == ["prompt_drawn", "prompt_sampled", "prompt_scored", fates.get(prompt_id, "prompt_dropped")]
    dropped = [line for line in lines if line["event"] == "prompt_dropped"]
    assert all(line["reason"] for line in dropped)

    # Lines of a job say where it belongs, and lines of the services it called which job called.
    made = next(line for line in lines if line["event"] == "pair_made")
    assert (made["run"], made["iteration"], made["job_id"]) == ("r", 1, "r/iter-1/pair")
    sampled = [line for line in lines if line["event"] == "prompt_sampled" and line["trace_id"] in by_trace]
    assert {line["request_id"] for line in sampled if line["prompt_id"] in drawn} == {
        f"r/iter-1/sample/{chunk:05d}" for chunk in range(3)
    }
    # And who asked for the run is found by the request's id.
    created = [line for line in lines if line["event"] == "event_published" and line["type"] == "run.created"]
    assert "r" in {line["topic"] for line in created}
    assert {line["request_id"] for line in created} == {REQUEST_ID}


async def test_a_request_from_outside_is_logged_under_the_trace_it_came_in(tmp_path: Path, json_logs: JsonLogs) -> None:
    app = create_reward(RewardSettings(token=SecretStr(TOKEN), store_url=str(tmp_path), reward_threads=1))
    app.state.registry._scorers["default"] = CountingScorer(
        "default", ScorerSpec(kind="bradley_terry", checkpoint="models/reward")
    )
    trace, own = "4bf92f3577b34da6a3ce929d0e0e4736", derived_trace_id("one prompt")
    items: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "q"}], "responses": ["a", "b"]},
        {"messages": [{"role": "user", "content": "q"}], "responses": ["a"], "trace_id": own},
    ]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://reward") as client,
    ):
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-Id": "mine"}
        answer = await client.post("/v1/score", json={"items": items}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == "mine"
    scored = [line for line in json_logs.lines() if line["event"] == "prompt_scored"]
    assert [(line["trace_id"], line["request_id"]) for line in scored] == [(trace, "mine"), (own, "mine")]
    assert scored[0]["responses"] == 2


def test_a_stored_pair_without_a_trace_id_is_still_read_and_one_with_it_trains_as_before(tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from datasets import load_dataset

    from services.platform.tables import from_parquet, to_parquet
    from tests.fixtures.trainer import make_pairs

    pair = make_pairs(1)[0].model_copy(update={"trace_id": prompt_trace_id("r", 1, "p0")})
    data = to_parquet([pair], Pair)
    assert from_parquet(data, Pair) == [pair]
    file = tmp_path / "pairs.parquet"
    file.write_bytes(data)
    row = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert row["trace_id"] == pair.trace_id
    assert row["chosen"] == [{"role": "assistant", "content": pair.chosen[0].content}]
    old = pq.read_table(file).drop_columns(["trace_id"])
    pq.write_table(old, file)
    assert from_parquet(file.read_bytes(), Pair) == [pair.model_copy(update={"trace_id": None})]
