"""Outside requests and rollouts through the gateway, over a fake vLLM."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from services.generator import passthrough
from services.generator.rollouts import derive_seed
from tests.fixtures.generator import (
    CHAT,
    HEADERS,
    Gateway,
    eventually,
    fake_policy,
    gateway,
    lines_of,
    prompts,
    rollout_body,
    run_gateway,
)

__all__ = ["gateway"]


async def test_an_answer_carries_policy_version_and_request_id(gateway: Gateway) -> None:
    await gateway.load("a")
    response = await gateway.client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "r1"})
    assert response.status_code == 200
    assert response.headers["x-policy-version"] == "models/a"
    assert response.headers["x-request-id"] == "r1"


async def test_vllm_s_errors_keep_openai_s_shape(gateway: Gateway) -> None:
    await gateway.load("a")
    response = await gateway.chat(model="nope")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"


async def test_models_names_the_served_version(gateway: Gateway) -> None:
    assert (await gateway.client.get("/v1/models")).status_code == 503
    await gateway.load("a")
    model = (await gateway.client.get("/v1/models")).json()["data"][0]
    assert (model["id"], model["root"], model["max_model_len"]) == ("policy", "models/a", 256)


async def test_a_stream_arrives_piece_by_piece(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.token_seconds = 0.005
    async with gateway.client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        pieces = [piece async for piece in response.aiter_raw()]
    assert len(pieces) >= 8
    assert pieces[-1].endswith(b"data: [DONE]\n\n") or b"[DONE]" in pieces[-2]


async def test_a_caller_that_goes_away_ends_the_generation(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.hold = asyncio.Event()
    for body in (CHAT, CHAT | {"stream": True}):
        request = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=body))
        await eventually(lambda: gateway.vllm.running == 1)
        request.cancel()
        await eventually(lambda: gateway.vllm.running == 0)


async def test_a_request_that_has_sent_nothing_is_taken_back_by_a_swap_and_answered_by_the_new_policy(
    gateway: Gateway,
) -> None:
    await gateway.load("a")
    gateway.vllm.hold = hold = asyncio.Event()
    asked = [asyncio.create_task(gateway.chat(stream=stream)) for stream in (False, True)]
    await eventually(lambda: gateway.vllm.running == 2)
    await gateway.load("b")
    hold.set()
    for answer in await asyncio.gather(*asked):
        assert answer.status_code == 200
        assert answer.headers["x-policy-version"] == "models/b"
        assert "models/b" in answer.text
        assert "models/a" not in answer.text


async def test_a_stream_that_has_begun_finishes_with_the_old_policy_before_the_swap(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.token_seconds = 0.02
    async with gateway.client.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 20}
    ) as response:
        pieces = response.aiter_text()
        text = await anext(pieces)
        swap = asyncio.create_task(gateway.load("b"))
        async for piece in pieces:
            text += piece
    assert "[DONE]" in text
    assert "models/b" not in text
    assert response.headers["x-policy-version"] == "models/a"
    assert (await swap).version == "models/b"


async def test_a_stream_that_holds_a_swap_too_long_ends_with_an_error_and_is_never_mixed(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    fake_policy(tmp_path, "b", seed=2)
    async with run_gateway(tmp_path, generator_stream_drain_seconds=0.05) as gateway:
        await gateway.load("a")
        gateway.vllm.token_seconds = 0.05
        async with gateway.client.stream(
            "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 200}
        ) as response:
            pieces = response.aiter_text()
            text = await anext(pieces)
            swap = asyncio.create_task(gateway.load("b"))
            text += "".join([piece async for piece in pieces])
        assert (await swap).version == "models/b"
        assert "models/b" not in text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == 503


async def test_no_request_fails_while_policies_are_swapped_under_load(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.token_seconds = 0.002
    stop = asyncio.Event()
    answers: list[httpx.Response] = []

    async def caller(stream: bool) -> None:
        while not stop.is_set():
            answers.append(await gateway.chat(stream=stream))

    async with asyncio.TaskGroup() as group:
        for index in range(6):
            group.create_task(caller(index % 2 == 0))
        for name in ("b", "a", "b", "a"):
            before = len(answers)
            await eventually(lambda before=before: len(answers) > before + 5)
            await gateway.load(name)
        stop.set()
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        version = answer.headers["x-policy-version"]
        other = {"models/a": "models/b", "models/b": "models/a"}[version]
        assert version in answer.text
        assert other not in answer.text


async def test_a_request_in_flight_when_vllm_dies_gets_a_503_with_retry_after(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.hold = asyncio.Event()
    asked = asyncio.create_task(gateway.chat())
    await eventually(lambda: gateway.vllm.running == 1)
    gateway.engine.kill()
    answer = await asked
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "vLLM" in answer.json()["error"]["message"]


async def test_too_many_outside_requests_are_refused_with_429(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    async with run_gateway(tmp_path, generator_max_outside_requests=1) as gateway:
        await gateway.load("a")
        gateway.vllm.hold = hold = asyncio.Event()
        first = asyncio.create_task(gateway.chat())
        await eventually(lambda: gateway.vllm.running == 1)
        assert (await gateway.chat()).status_code == 429
        hold.set()
        assert (await first).status_code == 200


# --- rollouts


async def test_every_prompt_has_exactly_one_line_with_all_its_responses(gateway: Gateway) -> None:
    await gateway.load("a")
    lines = lines_of(await gateway.rollouts("models/a", prompts(20)))
    found = {line.rollout.prompt_id: line.rollout for line in lines if line.rollout}
    assert set(found) == {f"p{i}" for i in range(20)}
    for rollout in found.values():
        assert [(r.temperature, r.index) for r in rollout.responses] == [(1.0, 0), (1.0, 1), (0.7, 0), (0.7, 1)]
        assert rollout.policy_version == "models/a"
        for response in rollout.responses:
            assert response.logprob == -0.5 * len(response.token_ids)
            assert (response.finish_reason == "stop") == (response.token_ids[-1] == 2)


async def test_the_same_request_gives_the_same_responses_and_another_seed_gives_others(gateway: Gateway) -> None:
    await gateway.load("a")

    async def sampled(seed: int) -> dict[str, object]:
        lines = lines_of(await gateway.rollouts("models/a", prompts(3), seed=seed))
        return {line.rollout.prompt_id: line.rollout.responses for line in lines if line.rollout}

    assert await sampled(1) == await sampled(1)
    assert await sampled(1) != await sampled(2)


def test_seeds_depend_on_prompt_and_group_and_on_nothing_else() -> None:
    assert derive_seed(1, "p", 0) == derive_seed(1, "p", 0)
    assert len({derive_seed(s, p, g) for s in (1, 2) for p in ("p", "q") for g in (0, 1)}) == 8


async def test_a_prompt_that_is_too_long_fails_alone_and_the_reason_has_the_figures(gateway: Gateway) -> None:
    await gateway.load("a")
    long = prompts(1, "word " * 300)[0].model_copy(update={"id": "long"})
    lines = lines_of(await gateway.rollouts("models/a", (*prompts(2), long)))
    failures = [line.failure for line in lines if line.failure]
    assert [failure.prompt_id for failure in failures] == ["long"]
    assert failures[0].problem.code == "invalid-input"
    assert "301 tokens" in failures[0].problem.detail
    assert "256 tokens" in failures[0].problem.detail
    assert sum(line.rollout is not None for line in lines) == 2


async def test_a_prompt_that_leaves_no_room_for_max_tokens_fails_instead_of_being_cut(gateway: Gateway) -> None:
    await gateway.load("a")
    lines = lines_of(await gateway.rollouts("models/a", prompts(1, "word " * 250), max_tokens=8))
    assert lines[0].failure is not None
    assert "251 tokens" in lines[0].failure.problem.detail


async def test_max_tokens_beyond_the_context_is_refused_for_the_whole_request(gateway: Gateway) -> None:
    await gateway.load("a")
    response = await gateway.rollouts("models/a", prompts(1), max_tokens=256)
    assert (response.status_code, response.json()["field"]) == (422, "sampling.max_tokens")


async def test_rollouts_of_another_version_are_refused(gateway: Gateway) -> None:
    await gateway.load("a")
    response = await gateway.rollouts("models/b", prompts(1))
    assert (response.status_code, response.json()["code"]) == (409, "policy-mismatch")
    assert gateway.policy.gate.in_flight() == []


async def test_a_swap_waits_for_running_rollouts_and_they_see_one_policy(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.token_seconds = 0.005
    running = asyncio.create_task(gateway.rollouts("models/a", prompts(10)))
    await eventually(lambda: gateway.vllm.running > 0)
    await gateway.load("b")
    lines = lines_of(await running)
    assert {line.rollout.policy_version for line in lines if line.rollout} == {"models/a"}
    assert {r.text for line in lines if line.rollout for r in line.rollout.responses} == {"models/a"}


async def test_a_swap_that_would_have_to_wait_too_long_for_rollouts_is_refused_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    fake_policy(tmp_path, "a", seed=1)
    fake_policy(tmp_path, "b", seed=2)
    async with run_gateway(tmp_path, generator_rollout_wait_seconds=0.02) as gateway:
        await gateway.load("a")
        gateway.vllm.hold = hold = asyncio.Event()
        running = asyncio.create_task(gateway.rollouts("models/a", prompts(1)))
        await eventually(lambda: gateway.vllm.running > 0)
        response = await gateway.put("b")
        assert response.status_code == 503
        assert "rollout requests still ran" in response.json()["detail"]
        assert (await gateway.info()).version == "models/a"
        hold.set()
        assert len(lines_of(await running)) == 1
        await gateway.load("b")


async def test_when_vllm_dies_each_unfinished_prompt_fails_retryably_and_finished_ones_stay(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    async with run_gateway(tmp_path, generator_rollout_concurrency=2) as gateway:
        await gateway.load("a")
        engine = gateway.engine
        async with gateway.client.stream(
            "POST", "/v1/rollouts", json=rollout_body("models/a", prompts(10)), headers=HEADERS
        ) as response:
            text = ""
            async for piece in response.aiter_text():
                text += piece
                engine.kill()
        lines = [json.loads(line) for line in text.splitlines()]
        done = [line for line in lines if "rollout" in line]
        failed = [line["failure"] for line in lines if "failure" in line]
        assert done
        assert failed
        assert len(done) + len(failed) == 10
        assert {failure["problem"]["code"] for failure in failed} == {"unavailable"}


async def test_concurrency_towards_vllm_is_bounded(tmp_path: Path) -> None:
    fake_policy(tmp_path, "a", seed=1)
    async with run_gateway(tmp_path, generator_rollout_concurrency=3) as gateway:
        await gateway.load("a")
        gateway.vllm.token_seconds = 0.001
        await gateway.rollouts("models/a", prompts(10))
        assert gateway.vllm.most_running <= 3


async def test_a_caller_that_leaves_its_rollouts_frees_the_gate(gateway: Gateway) -> None:
    await gateway.load("a")
    gateway.vllm.hold = asyncio.Event()
    request = asyncio.create_task(gateway.rollouts("models/a", prompts(4)))
    await eventually(lambda: gateway.vllm.running > 0)
    request.cancel()
    await eventually(lambda: not gateway.policy.gate.in_flight() and gateway.vllm.running == 0)
    await gateway.load("b")


async def test_metrics_count_swaps_and_tokens(gateway: Gateway) -> None:
    await gateway.load("a")
    await gateway.load("b")
    await gateway.rollouts("models/b", prompts(1))
    text = (await gateway.client.get("/metrics")).text
    assert 'ratchet_generator_swaps_total{outcome="done"}' in text
    assert "ratchet_generator_rollout_tokens_total" in text


async def test_a_body_too_large_for_any_context_is_refused_before_it_is_read_whole(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "MAX_BODY_BYTES", 1000)
    response = await gateway.chat(messages=[{"role": "user", "content": "x" * 2000}])
    assert response.status_code == 413
    assert "1,000 bytes" in response.json()["detail"]
