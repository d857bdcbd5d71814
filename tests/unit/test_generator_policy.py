"""Loading, swapping, restoring and trying policies, over a fake vLLM that speaks the real protocol."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.fake_vllm import FakeVllm
from tests.fixtures.generator import Gateway, eventually, fake_policy, gateway, prompts, run_gateway
from tests.fixtures.models import write_manifest

__all__ = ["gateway"]


async def test_a_fresh_generator_is_alive_but_not_ready_and_says_what_to_do(gateway: Gateway) -> None:
    assert (await gateway.client.get("/health/live")).status_code == 200
    ready = await gateway.client.get("/health/ready")
    assert ready.status_code == 503
    assert "PUT /v1/policy" in ready.json()["detail"]
    assert (await gateway.info()).state == "empty"


async def test_the_first_policy_starts_an_engine_and_is_proven(gateway: Gateway) -> None:
    info = await gateway.load("a")
    assert (info.state, info.version, info.engine_starts, info.swaps) == ("serving", "models/a", 1, 0)
    assert info.proof_deviation == pytest.approx(0, abs=1e-9)
    assert gateway.vllm.calls == ["prove"]
    assert (await gateway.client.get("/health/ready")).status_code == 200


async def test_a_swap_pauses_loads_clears_the_cache_and_proves_in_this_order_without_a_restart(
    gateway: Gateway,
) -> None:
    await gateway.load("a")
    gateway.vllm.calls.clear()
    info = await gateway.load("b")
    assert (info.version, info.engine_starts, info.swaps) == ("models/b", 1, 1)
    assert gateway.vllm.calls == ["pause", "load:models/b", "reset", "resume", "prove"]


async def test_putting_what_is_served_changes_nothing(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.calls.clear()
    assert (await gateway.load("a")).swaps == 0
    assert gateway.vllm.calls == []


async def test_two_puts_of_one_checkpoint_at_once_are_one_change(gateway: Gateway) -> None:
    first, second = await asyncio.gather(gateway.load("a"), gateway.load("a"))
    assert first.version == second.version == "models/a"
    assert len(gateway.engines.started) == 1


async def test_a_put_of_another_checkpoint_waits_for_the_change_under_way(gateway: Gateway) -> None:
    await asyncio.gather(gateway.load("a"), gateway.load("b"))
    assert len(gateway.engines.started) == 1


async def test_a_put_that_takes_too_long_is_answered_202_and_joined_by_the_next(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    async with run_gateway(tmp_path, generator_put_wait_seconds=1e-9) as gateway:
        response = await gateway.put("a")
        assert (response.status_code, response.json()["state"]) == (202, "starting")
        await eventually(lambda: gateway.policy.state == "serving")
        assert (await gateway.put("a")).status_code == 200


async def test_control_routes_need_the_token(gateway: Gateway) -> None:
    for method, path in (("PUT", "/v1/policy"), ("POST", "/v1/rollouts")):
        response = await gateway.client.request(method, path, json={})
        assert response.status_code == 401


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/sleep", "/pause", "/reset_prefix_cache", "/tokenize", "/v1/load_lora_adapter"]
)
async def test_no_other_route_of_vllm_is_reachable(gateway: Gateway, path: str) -> None:
    await gateway.load("a")
    assert (await gateway.client.post(path, json={})).status_code == 404


# --- refused before the engine sees it


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    write_manifest(folder, **_FIELDS)


def _changed(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"y" * 512)


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"y")


def _missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _stray(folder: Path) -> None:
    (folder / "extra.json").write_text("{}")


def _no_probes(folder: Path) -> None:
    write_manifest(folder, **(_FIELDS | {"logprob_probes": ()}))


def _reward_model(folder: Path) -> None:
    write_manifest(folder, **(_FIELDS | {"kind": "reward_model"}))


def _dtype(folder: Path) -> None:
    write_manifest(folder, **(_FIELDS | {"dtype": "int8"}))


def _no_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()


_FIELDS: dict[str, Any] = {
    "version": "models/bad",
    "tied_embeddings": True,
    "parameters": 1,
    "logprob_probes": ({"token_ids": (1, 2), "logprobs": (-1.0,)},),
}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_pickle, "pickle"),
        (_changed, "SHA-256"),
        (_cut, "bytes"),
        (_missing, "not in the folder"),
        (_stray, "not in the manifest"),
        (_no_probes, "probes"),
        (_reward_model, "reward_model"),
        (_dtype, "int8"),
        (_no_manifest, "no MANIFEST.json"),
    ],
)
async def test_a_bad_checkpoint_is_refused_before_the_engine_sees_it(gateway: Gateway, spoil: Any, told: str) -> None:
    await gateway.load("a")
    gateway.vllm.calls.clear()
    fake_policy(gateway.store, "bad", seed=9)
    spoil(gateway.store / "models" / "bad")
    response = await gateway.put("bad")
    assert (response.status_code, response.json()["code"]) == (422, "checkpoint-refused")
    assert told in response.json()["detail"]
    assert gateway.vllm.calls == []
    assert (await gateway.info()).version == "models/a"
    assert (await gateway.chat()).status_code == 200


@pytest.mark.parametrize("path", ["../secret", "/etc", "https://evil/x", "models/../../x", ""])
async def test_a_path_outside_the_store_is_refused(gateway: Gateway, path: str) -> None:
    response = await gateway.client.put(
        "/v1/policy", json={"checkpoint": path}, headers={"Authorization": "Bearer test-token-of-the-generator"}
    )
    assert response.status_code == 422
    assert response.json()["field"] == "checkpoint"


async def test_another_shape_is_refused_unless_a_restart_is_allowed(gateway: Gateway) -> None:
    await gateway.load("a")
    response = await gateway.put("other")
    assert response.status_code == 422
    assert "allow_restart" in response.json()["detail"]
    info = await gateway.load("other", allow_restart=True)
    assert (info.version, info.engine_starts) == ("models/other", 2)
    assert gateway.engines.started[0].died.is_set()


async def test_a_refused_first_checkpoint_leaves_the_generator_empty(gateway: Gateway) -> None:
    assert (await gateway.put("nope")).status_code == 422
    assert (await gateway.info()).state == "empty"


# --- failed swaps


async def test_a_load_that_fails_restores_and_proves_the_previous_policy(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.load_errors = {"models/b": "KeyError: 'lm_head'"}
    response = await gateway.put("b")
    assert (response.status_code, response.json()["code"]) == (502, "swap-failed")
    assert "models/a is restored" in response.json()["detail"]
    info = await gateway.info()
    assert (info.state, info.version, info.swaps, info.engine_starts) == ("serving", "models/a", 0, 1)


async def test_a_load_that_changes_nothing_is_caught_by_the_proof(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.stale_after_load = True
    response = await gateway.put("b")
    assert response.status_code == 502
    assert "off by" in response.json()["detail"]
    assert (await gateway.info()).version == "models/a"
    assert (await gateway.chat()).headers["x-policy-version"] == "models/a"


async def test_a_policy_that_cannot_be_restored_in_place_is_restored_by_a_restart(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.load_errors = dict.fromkeys(("models/a", "models/b"), "out of memory")
    response = await gateway.put("b")
    assert "models/a is restored" in response.json()["detail"]
    assert (await gateway.info()).engine_starts == 2
    assert (await gateway.chat()).status_code == 200


async def test_when_the_restart_fails_too_the_gate_stays_shut_and_readiness_says_why(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.load_errors = dict.fromkeys(("models/a", "models/b"), "out of memory")
    gateway.engines.fail_starts = ["MemoryError: no space"]
    assert (await gateway.put("b")).status_code == 502
    assert (await gateway.info()).state == "failed"
    detail = (await gateway.client.get("/health/ready")).json()["detail"]
    assert "out of memory" in detail
    assert "MemoryError: no space" in detail
    refused = await gateway.chat()
    assert refused.status_code == 503
    assert "out of memory" in refused.json()["error"]["message"]
    assert (await gateway.load("b")).state == "serving"


async def test_an_engine_that_starts_with_wrong_weights_never_serves(gateway: Gateway) -> None:
    def spoil(vllm: FakeVllm) -> None:
        vllm.noise = 1.0

    gateway.engines.prepare = spoil
    response = await gateway.put("a")
    assert response.status_code == 502
    assert (await gateway.info()).state == "failed"
    assert (await gateway.chat()).status_code == 503


async def test_a_replacement_that_does_not_start_brings_the_previous_policy_back(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.engines.fail_starts = ["ValueError: no such architecture"]
    response = await gateway.put("other", allow_restart=True)
    assert response.status_code == 502
    assert "no such architecture" in response.json()["detail"]
    info = await gateway.info()
    assert (info.state, info.version) == ("serving", "models/a")


# --- engine deaths


async def test_a_dead_engine_is_restarted_with_the_last_proven_policy(gateway: Gateway) -> None:
    await gateway.load("a")
    await gateway.load("b")
    gateway.engine.kill()
    await eventually(lambda: len(gateway.engines.started) == 2 and gateway.policy.state == "serving")
    info = await gateway.info()
    assert (info.version, info.engine_starts) == ("models/b", 2)
    assert gateway.vllm.calls == ["prove"]
    assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "models/b"


async def test_a_trial_survives_the_death_of_the_engine(gateway: Gateway) -> None:
    await gateway.load("a")
    await gateway.load("b", trial=True)
    gateway.engine.kill()
    await eventually(lambda: len(gateway.engines.started) == 2 and gateway.policy.state == "serving")
    assert (await gateway.info()).trial


async def test_restarts_are_bounded_and_the_end_is_explained(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.engines.fail_starts = ["Killed: out of memory"] * 10
    gateway.engine.kill()
    await eventually(lambda: gateway.policy.state == "failed")
    assert len(gateway.engines.started) == 5
    assert "Killed: out of memory" in (await gateway.client.get("/health/ready")).json()["detail"]


async def test_a_silent_engine_is_unready_at_once_and_replaced_after_some_missed_checks(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.healthy = False
    await eventually(lambda: gateway.policy.unready() is not None)
    await eventually(lambda: len(gateway.engines.started) == 2 and gateway.policy.unready() is None)


async def test_an_engine_that_dies_during_a_swap_comes_back_with_the_old_policy(gateway: Gateway) -> None:
    await gateway.load("a")
    engine = gateway.engine

    async def kill() -> None:
        await eventually(lambda: "load:models/b" in engine.vllm.calls or "pause" in engine.vllm.calls)
        engine.kill()

    engine.vllm.stale_after_load = True
    response, _ = await asyncio.gather(gateway.put("b"), kill())
    assert response.status_code == 502
    assert (await gateway.info()).version == "models/a"


# --- trial


async def test_outside_requests_wait_during_a_trial_and_promotion_answers_them_without_a_reload(
    gateway: Gateway,
) -> None:
    await gateway.load("a")
    await gateway.load("b", trial=True)
    gateway.vllm.calls.clear()
    waiting = asyncio.create_task(gateway.chat())
    response = await gateway.rollouts("models/b", prompts(1))
    assert response.status_code == 200
    assert not waiting.done()
    info = await gateway.load("b")
    assert (info.trial, gateway.vllm.calls) == (False, [])
    assert (await waiting).headers["x-policy-version"] == "models/b"


async def test_a_rejected_candidate_never_answers_an_outside_request(gateway: Gateway) -> None:
    await gateway.load("a")
    await gateway.load("b", trial=True)
    waiting = asyncio.create_task(gateway.chat())
    await asyncio.sleep(0)
    await gateway.load("a")
    answer = await waiting
    assert answer.headers["x-policy-version"] == "models/a"
    assert answer.json()["choices"][0]["message"]["content"] == "models/a"


async def test_the_wait_for_a_trial_is_bounded(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    async with run_gateway(tmp_path, generator_trial_wait_seconds=0.02) as gateway:
        await gateway.load("a", trial=True)
        response = await gateway.chat()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert "on trial" in response.json()["error"]["message"]


async def test_the_candidate_answers_outside_requests_when_the_trial_says_so(gateway: Gateway) -> None:
    await gateway.load("a")
    await gateway.load("b", trial=True, trial_traffic="serve")
    assert (await gateway.chat()).headers["x-policy-version"] == "models/b"


async def test_a_policy_named_in_the_settings_is_loaded_at_start(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    async with run_gateway(tmp_path, generator_policy="models/a") as gateway:
        await eventually(lambda: gateway.policy.state == "serving")
        assert (await gateway.info()).version == "models/a"
