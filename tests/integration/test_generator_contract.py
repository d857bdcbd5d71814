"""What the gateway relies on in vLLM, asserted of the fake and of the real one."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from services.contracts.errors import UpstreamFailed
from services.contracts.rollouts import SamplingGroup
from services.generator.engine_client import EngineClient, EngineRejected
from services.generator.probes import Tolerance, judge
from services.generator.rollouts import read_answer
from services.platform.store import ArtifactStore
from tests.fixtures.fake_vllm import FakeVllm, StreamingTransport
from tests.fixtures.generator import make_settings
from tests.fixtures.real_generator import RealGenerator

pytestmark = pytest.mark.timeout(600)

GROUP = SamplingGroup(n=3, temperature=1.0)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest_asyncio.fixture(params=["fake", "real"])
async def vllm(
    request: pytest.FixtureRequest, real_generator: RealGenerator, tmp_path: Path
) -> AsyncIterator[EngineClient]:
    """A client of a vLLM that serves policy `a`."""
    settings = make_settings(real_generator.folder / "store")
    if request.param == "fake":
        fake = FakeVllm(real_generator.folder / "store" / "models" / "a")
        fake.sleep_mode = False  # as the real one, on CPU
        client = EngineClient("http://fake", settings, transport=StreamingTransport(fake.app, fake.gone))
    else:
        real_generator.ensure("a")  # not in a thread: see RealGenerator._start
        client = EngineClient(real_generator.engine_url(), settings)
    yield client
    await client.close()


async def test_it_says_what_it_is(vllm: EngineClient) -> None:
    assert await vllm.healthy(5)
    assert (await vllm.describe()).model_dump() == {"dtype": "float32", "max_model_len": 256, "sleep_mode": False}


async def test_sampling_gives_ids_log_probs_and_finish_reasons_that_fit_together(vllm: EngineClient) -> None:
    prompt, responses = read_answer(await vllm.sample(MESSAGES, GROUP, 12, seed=3), GROUP, 3)
    assert len(prompt) == await vllm.count_tokens(MESSAGES)
    assert prompt[0] == 1
    for response in responses:
        assert 1 <= len(response.token_ids) <= 12
        assert response.logprob < 0
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == 2)


async def test_a_seed_makes_sampling_repeatable_and_its_responses_differ(vllm: EngineClient) -> None:
    first = read_answer(await vllm.sample(MESSAGES, GROUP, 12, seed=3), GROUP, 3)
    again = read_answer(await vllm.sample(MESSAGES, GROUP, 12, seed=3), GROUP, 3)
    other = read_answer(await vllm.sample(MESSAGES, GROUP, 12, seed=4), GROUP, 4)
    ids = [response.token_ids for response in first[1]]
    assert ids == [response.token_ids for response in again[1]]
    assert ids != [response.token_ids for response in other[1]]
    assert len(set(ids)) == GROUP.n


async def test_a_prompt_that_is_too_long_is_rejected_and_can_be_counted(vllm: EngineClient) -> None:
    long = [{"role": "user", "content": "word " * 300}]
    with pytest.raises(EngineRejected):
        await vllm.sample(long, GROUP, 12, seed=3)
    assert await vllm.count_tokens(long) > 256


async def test_max_tokens_that_do_not_fit_beside_the_prompt_are_lowered_without_a_word(vllm: EngineClient) -> None:
    prompt, responses = read_answer(await vllm.sample(MESSAGES, GROUP, 255, seed=3), GROUP, 3)
    assert max(len(response.token_ids) for response in responses) <= 256 - len(prompt)


async def test_weights_are_swapped_in_place_and_back_and_the_log_probs_prove_it(
    vllm: EngineClient, real_generator: RealGenerator
) -> None:
    store = ArtifactStore(str(real_generator.folder / "store"))
    a, b = store.manifest("models/a"), store.manifest("models/b")
    tolerance = Tolerance(0.002, 0.02)
    for name, new, old in (("b", b, a), ("a", a, b)):
        await vllm.pause()
        await vllm.load(store.local_folder(f"models/{name}"))
        await vllm.reset_prefix_cache()
        await vllm.resume()
        served = await vllm.prompt_logprobs(new.logprob_probes)
        assert judge(new.logprob_probes, served, tolerance, old.logprob_probes).proven
        assert not judge(old.logprob_probes, served, tolerance).proven


async def test_it_sleeps_and_wakes_when_told_and_gives_the_same_log_probs(
    vllm: EngineClient, real_generator: RealGenerator
) -> None:
    probes = ArtifactStore(str(real_generator.folder / "store")).manifest("models/a").logprob_probes
    before = await vllm.prompt_logprobs(probes)
    for _ in range(2):
        assert await asked(vllm, "GET", "/is_sleeping") == {"is_sleeping": False}
        assert await asked(vllm, "POST", "/sleep?level=1&mode=abort") == {"status": "sleeping", "level": 1}
        assert await asked(vllm, "GET", "/is_sleeping") == {"is_sleeping": True}
        assert await vllm.healthy(5), "sleeping is not being ill"
        assert await asked(vllm, "POST", "/wake_up") == {"status": "awake", "tags": None}
        assert await asked(vllm, "GET", "/is_sleeping") == {"is_sleeping": False}
    await vllm.sleep()
    await vllm.wake_up()
    await vllm.reset_prefix_cache()
    assert await vllm.prompt_logprobs(probes) == before


async def test_waking_what_is_awake_and_sleeping_twice_are_harmless(vllm: EngineClient) -> None:
    await vllm.wake_up()
    await vllm.sleep()
    await vllm.sleep()
    await vllm.wake_up()
    assert await asked(vllm, "GET", "/is_sleeping") == {"is_sleeping": False}


async def asked(vllm: EngineClient, method: str, path: str) -> object:
    """The bare answer of one of vLLM's routes."""
    response = await vllm.generation.request(method, path)
    assert response.status_code == 200, response.text
    return response.json()


async def test_openai_errors_and_streams_have_openai_s_shape(vllm: EngineClient) -> None:
    body = {"model": "nope", "messages": MESSAGES, "max_tokens": 4}
    refused = await vllm.generation.post("/v1/chat/completions", json=body)
    assert refused.status_code == 404
    assert {"message", "type", "param", "code"} <= set(refused.json()["error"])
    response = await vllm.generation.post("/v1/chat/completions", json=body | {"model": "policy", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "delta" in json.loads(events[0])["choices"][0]


async def test_a_caller_that_goes_away_leaves_nothing_running(vllm: EngineClient) -> None:
    body = {"model": "policy", "messages": MESSAGES, "max_tokens": 200, "n": 16, "min_tokens": 200}
    with pytest.raises(httpx.ReadTimeout):
        await asyncio.wait_for(_timed_out(vllm, body), 10)
    await vllm.pause()
    await vllm.reset_prefix_cache()
    await vllm.resume()


async def _timed_out(vllm: EngineClient, body: dict[str, object]) -> None:
    request = asyncio.create_task(vllm.generation.post("/v1/chat/completions", json=body))
    await asyncio.sleep(0.02)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    raise httpx.ReadTimeout("the caller went away")


@pytest.mark.parametrize("vllm", ["real"], indirect=True)  # the fake is told by its tests what fails
async def test_a_load_that_fails_is_answered_and_does_not_kill_the_engine(
    vllm: EngineClient, tmp_path: Path, real_generator: RealGenerator
) -> None:
    with pytest.raises(UpstreamFailed):
        await vllm.load(tmp_path / "nothing-here")
    store = ArtifactStore(str(real_generator.folder / "store"))
    await vllm.load(store.local_folder("models/a"))
    await vllm.reset_prefix_cache()
    probes = store.manifest("models/a").logprob_probes
    assert judge(probes, await vllm.prompt_logprobs(probes), Tolerance(0.002, 0.02)).proven
