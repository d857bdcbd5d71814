"""The trainer end to end: real Redis, real child processes, real TRL on a model of half a million parameters."""

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from ratchet.local.redis_server import RedisServer
from services.contracts.jobs import JobState
from services.contracts.training import TrainingResult
from services.platform.checkpoints import verify_checkpoint
from tests.fixtures.models import logprobs_of
from tests.fixtures.trainer import (
    TrainerUnderTest,
    config,
    make_pairs,
    preference_rows,
    put_jsonl,
    put_pairs,
    sft_rows,
    trainer_service,
    write_model,
)

pytestmark = pytest.mark.timeout(600)
LONG = {"num_train_epochs": 20, "save_steps": 5}


@pytest_asyncio.fixture
async def trainer(redis_server: RedisServer, redis_client: Redis, tmp_path: Path) -> AsyncIterator[TrainerUnderTest]:
    write_model(tmp_path / "staging" / "base")
    async with trainer_service(redis_server.url, tmp_path) as service:
        put_jsonl(service.store, "datasets/sft.jsonl", sft_rows(48))
        yield service


async def imported(trainer: TrainerUnderTest, source: str = "base", output: str = "models/base") -> str:
    job = await trainer.run(kind="import_model", model_kind="policy", source=f"store:staging/{source}", output=output)
    assert job.state is JobState.SUCCEEDED, job.problem
    return output


def sft(**changes: object) -> dict[str, object]:
    return {
        "kind": "sft", "start": "models/base", "data": "datasets/sft.jsonl", "config": config(), "output": "models/sft",
    } | changes  # fmt: skip


async def test_each_kind_of_job_publishes_a_checkpoint_that_proves_itself(trainer: TrainerUnderTest) -> None:
    put_jsonl(trainer.store, "datasets/preferences.jsonl", preference_rows(40))
    put_jsonl(trainer.store, "datasets/heldout.jsonl", preference_rows(16, seed=9))
    pairs = put_pairs(trainer.store, "runs/r/iter-1/pairs.parquet", make_pairs(40))
    await imported(trainer)
    jobs = [
        sft(),
        {
            "kind": "reward_model", "start": "models/sft", "data": "datasets/preferences.jsonl",
            "heldout": "datasets/heldout.jsonl", "config": config(), "output": "models/rm",
        },
        {
            "kind": "dpo", "start": "models/sft", "reference": "models/base", "pairs": [pairs],
            "config": config(learning_rate=2e-4), "output": "runs/r/iter-1/checkpoint",
        },
    ]  # fmt: skip
    for request in jobs:
        job = await trainer.run(**request)
        assert job.state is JobState.SUCCEEDED, job.problem
        result = TrainingResult.model_validate(job.result)
        assert result.curve
        assert result.metrics["examples"] == (48 if request["kind"] == "sft" else 40)
        assert result.metrics["dropped_too_long"] == 0

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    sft_manifest = verify_checkpoint(trainer.store, "models/sft", "policy")
    dpo = verify_checkpoint(trainer.store, "runs/r/iter-1/checkpoint", "policy")
    assert dpo.version == "r/iter-1"
    assert (dpo.lineage.start, dpo.lineage.reference) == ("models/sft", "models/base")
    assert (dpo.config_hash, dpo.tokenizer_hash) == (sft_manifest.config_hash, sft_manifest.tokenizer_hash)
    assert dpo.metrics["probe_shift"] > 0.01
    own = AutoModelForCausalLM.from_pretrained(trainer.store.local_folder("runs/r/iter-1/checkpoint"))
    other = AutoModelForCausalLM.from_pretrained(trainer.store.local_folder("models/sft"))
    for probe in dpo.logprob_probes:
        assert probe.logprobs == pytest.approx(logprobs_of(own, probe.token_ids), abs=1e-4)
    assert any(
        abs(a - b) > 0.01
        for probe in dpo.logprob_probes
        for a, b in zip(probe.logprobs, logprobs_of(other, probe.token_ids), strict=True)
    )
    reward = verify_checkpoint(trainer.store, "models/rm", "reward_model")
    assert reward.metrics["heldout_accuracy"] > 0.9
    scorer = AutoModelForSequenceClassification.from_pretrained(trainer.store.local_folder("models/rm"))
    assert scorer.config.pad_token_id != scorer.config.eos_token_id
    import torch

    for probe in reward.score_probes:
        assert probe.score == pytest.approx(scorer(torch.tensor([probe.token_ids])).logits.item(), abs=1e-4)
    assert [name for name in trainer.store.list("runs/r/iter-1") if name.startswith("reference-")]


async def test_a_killed_child_is_resumed_and_ends_with_the_same_weights(trainer: TrainerUnderTest) -> None:
    await imported(trainer)
    job = await trainer.submit(**sft(config=config(**LONG)))
    await trainer.until_step(job.id, 12)
    os.kill(trainer.child_pid(), signal.SIGKILL)
    ended = await trainer.finished(job.id)
    assert ended.state is JobState.SUCCEEDED, ended.problem
    result = TrainingResult.model_validate(ended.result)
    assert ended.attempts == 2
    assert result.resumed_from_step is not None
    assert result.resumed_from_step >= 5
    assert result.resumed_from_step % 5 == 0
    assert result.metrics["steps"] == 120
    whole = await trainer.run(**sft(config=config(**LONG), output="models/whole"))
    assert TrainingResult.model_validate(whole.result).resumed_from_step is None

    from safetensors.torch import load_file

    killed, uninterrupted = (
        load_file(trainer.store.local_folder(folder) / "model.safetensors") for folder in ("models/sft", "models/whole")
    )
    deviation = max((killed[name] - uninterrupted[name]).abs().max().item() for name in uninterrupted)
    assert deviation < 1e-5


async def test_a_cancel_ends_the_child_within_seconds_and_a_retry_goes_on(trainer: TrainerUnderTest) -> None:
    await imported(trainer)
    job = await trainer.submit(**sft(config=config(**LONG)))
    await trainer.until_step(job.id, 8)
    pid = trainer.child_pid()
    began = time.monotonic()
    assert (await trainer.client.delete(f"/v1/jobs/{job.id}")).status_code == 202
    ended = await trainer.finished(job.id)
    assert ended.state is JobState.CANCELLED
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not trainer.store.exists("models/sft")

    assert (await trainer.client.post(f"/v1/jobs/{job.id.replace('/', '%2F')}/retry")).status_code == 202
    await trainer.until_step(job.id, 9)
    again = await trainer.finished(job.id)
    assert again.state is JobState.SUCCEEDED, again.problem
    assert (TrainingResult.model_validate(again.result).resumed_from_step or 0) >= 5


async def test_the_same_job_twice_is_one_job_and_survives_a_wiped_queue(
    trainer: TrainerUnderTest, redis_client: Redis
) -> None:
    await imported(trainer)
    first, second = await trainer.submit(**sft()), await trainer.submit(**sft())
    assert first.id == second.id
    done = await trainer.finished(first.id)
    assert done.state is JobState.SUCCEEDED, done.problem
    await redis_client.flushall()
    began = time.monotonic()
    again = await trainer.run(**sft())
    assert again.result == done.result
    assert time.monotonic() - began < 5
    conflict = await trainer.client.post("/v1/jobs", json=sft(config=config(learning_rate=5e-3)))
    assert conflict.status_code == 409
    assert conflict.json()["field"] == "output"


async def test_events_are_replayed_and_end_with_the_job(trainer: TrainerUnderTest) -> None:
    job = await trainer.submit(
        kind="import_model", model_kind="policy", source="store:staging/base", output="models/base"
    )
    async with trainer.client.stream("GET", f"/v1/jobs/{job.id}/events") as answer:
        lines = [line async for line in answer.aiter_lines()]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert events[0]["type"] == "job.queued"
    assert events[-1]["type"] == "job.succeeded"
    middle = events[len(events) // 2]["id"]
    async with trainer.client.stream("GET", f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": middle}) as answer:
        rest = [line async for line in answer.aiter_lines() if line.startswith("id: ")]
    assert [line.removeprefix("id: ") for line in rest] == [e["id"] for e in events if e["id"] > middle]
    assert (await trainer.client.get("/v1/jobs/train/none/events")).status_code == 404


async def test_bad_input_fails_with_its_cause_at_the_first_attempt(trainer: TrainerUnderTest) -> None:
    await imported(trainer)
    lines = [*(json.dumps(row) for row in sft_rows(3)), '{"messages": [', '{"messages": []}']
    trainer.store.publish_bytes("datasets/broken.jsonl", "\n".join(lines).encode())
    job = await trainer.run(**sft(data="datasets/broken.jsonl"))
    assert job.state is JobState.FAILED
    assert job.problem is not None
    assert "line 4: not JSON" in job.problem.detail
    assert "line 5: messages is empty" in job.problem.detail
    assert (job.problem.code, job.problem.field, job.attempts) == ("invalid-input", "data", 1)


async def test_control_routes_need_the_token_and_unknown_keys_are_refused(trainer: TrainerUnderTest) -> None:
    refused = await trainer.client.post("/v1/jobs", json=sft(), headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401
    answer = await trainer.client.post("/v1/jobs", json=sft(config=config(label_smoothing=0.1)))
    assert answer.status_code == 422
    assert "label_smoothing" in answer.text
    assert (await trainer.client.get("/health/ready")).status_code == 200
    assert (await trainer.client.get("/health/live")).status_code == 200
