"""Taking turns on one device: vLLM sleeps while a lease is held, and only a proof ends that; over a fake vLLM."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY
from pydantic import SecretStr

from services.contracts.device import LeaseRequest
from services.contracts.errors import Conflict
from services.contracts.recipes import Recipe
from services.generator.turns import Turns
from services.generator.watch import Watcher
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.upstream import Upstream
from services.platform.http import ServiceClient
from tests.fixtures.fake_vllm import StreamingTransport
from tests.fixtures.generator import (
    CHAT,
    TOKEN,
    Gateway,
    eventually,
    fake_policy,
    lines_of,
    make_settings,
    prompts,
    run_gateway,
)

GRACE_SECONDS = 0.2
SECONDS = 0.3
"""A lease so short that a test can wait for its end, and renewed often enough for the grace."""
RECIPE = Recipe.model_validate(
    {
        "policy": "models/a", "reward_model": "models/rm",
        "prompts": {"path": "datasets/p.jsonl"}, "heldout": {"path": "datasets/h.jsonl"},
        "sampling": {"prompts_per_iteration": 8, "max_tokens": 16},
        "dpo": {"learning_rate": 1e-4, "train_batch_size": 8, "max_length": 64},
    }
)  # fmt: skip
SLEEPER: dict[str, Any] = {"generator_sleep": True, "generator_gate_wait_seconds": 5.0}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fake_policy(tmp_path, "a", seed=1)
    fake_policy(tmp_path, "b", seed=2)
    return tmp_path


@pytest_asyncio.fixture
async def gateway(store: Path) -> AsyncIterator[Gateway]:
    """A generator that shares its device and serves `a`."""
    async with run_gateway(store, **SLEEPER, generator_lease_grace_seconds=GRACE_SECONDS) as running:
        await running.load("a")
        # from here on only the length of leases depends on it
        running.policy.leases._grace_seconds = 30.0
        running.vllm.calls.clear()
        yield running


async def served(gateway: Gateway) -> None:
    await eventually(lambda: gateway.policy.state == "serving")


def detail(response: httpx.Response) -> str:
    body = response.json()
    return str(body.get("detail") or body["error"]["message"])


# --- a turn


async def test_a_lease_puts_vllm_to_sleep_and_giving_it_back_wakes_and_proves_it(gateway: Gateway) -> None:
    lease = await gateway.lent("trainer-1 for run/iter-1/train")
    assert gateway.vllm.calls == ["sleep"]
    assert (lease.engine, lease.holder) == ("asleep", "trainer-1 for run/iter-1/train")
    assert 55 < lease.seconds_left <= 60
    info = await gateway.info()
    assert (info.state, info.version, info.lease and info.lease.id) == ("asleep", "models/a", lease.id)
    gateway.vllm.calls.clear()
    given = await gateway.give_back("trainer-1 for run/iter-1/train")
    assert (given.status_code, given.json()["state"], given.json()["lease"]) == (200, "waking", None)
    await served(gateway)
    assert gateway.vllm.calls == ["wake", "reset", "prove"]
    assert (await gateway.chat()).headers["x-policy-version"] == "models/a"
    info = await gateway.info()
    assert (info.state, info.engine_starts, info.detail, info.lease) == ("serving", 1, None, None)


async def test_an_asleep_generator_is_alive_not_ready_and_says_who_holds_the_device(gateway: Gateway) -> None:
    await gateway.lent("trainer-1")
    assert (await gateway.client.get("/health/live")).status_code == 200
    ready = await gateway.client.get("/health/ready")
    assert (ready.status_code, ready.json()["detail"]) == (503, "asleep: trainer-1 holds the device")
    assert REGISTRY.get_sample_value("ratchet_generator_asleep") == 1
    assert REGISTRY.get_sample_value("ratchet_generator_ready") == 0
    await gateway.give_back("trainer-1")
    await served(gateway)
    assert (await gateway.client.get("/health/ready")).status_code == 200
    assert REGISTRY.get_sample_value("ratchet_generator_asleep") == 0


async def test_requests_wait_while_vllm_sleeps_and_are_answered_when_it_wakes(gateway: Gateway) -> None:
    await gateway.lent()
    outside = asyncio.create_task(gateway.chat())
    rollouts = asyncio.create_task(gateway.rollouts("models/a", prompts(1)))
    put = asyncio.create_task(gateway.put("b"))
    await eventually(lambda: gateway.policy.gate._admitted == {"outside": 1, "rollouts": 1})
    assert gateway.vllm.disturbed == []
    await gateway.give_back()
    assert (await outside).status_code == 200
    assert lines_of(await rollouts)[0].rollout is not None
    assert (await put).json()["version"] == "models/b"
    assert gateway.vllm.disturbed == []


async def test_the_wait_for_a_lease_is_bounded_and_its_holder_is_named(store: Path) -> None:
    async with run_gateway(store, generator_sleep=True, generator_gate_wait_seconds=0.05) as gateway:
        gateway.policy.leases._grace_until = 0.0
        await gateway.load("a")
        await gateway.lent("trainer-1")
        for answer in await asyncio.gather(gateway.chat(), gateway.rollouts("models/a", prompts(1)), gateway.put("b")):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "trainer-1 holds the device" in detail(answer)
        assert gateway.vllm.disturbed == []
        assert (await gateway.info()).version == "models/a"


async def test_the_load_after_a_training_waits_out_a_waking_that_takes_longer_than_a_put(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.generator.policy.RETRY_SECONDS", 0.01)
    async with run_gateway(store, generator_sleep=True) as gateway:
        gateway.policy.leases._grace_until = 0.0
        await gateway.load("a")
        await gateway.lent()
        gateway.policy._settings = make_settings(store, generator_put_wait_seconds=0.05)
        gateway.vllm.slumber = waking = asyncio.Event()
        await gateway.give_back()
        await eventually(lambda: gateway.vllm.calls[-1] == "wake")
        generator = ServiceClient(
            "generator", "http://generator", SecretStr(TOKEN), retry=False, transport=StreamingTransport(gateway.app)
        )
        settings = OrchestratorSettings(token=SecretStr(TOKEN), store_url=str(store))
        context, told = Waits(), list[str]()
        context.told = lambda waiting: (told.append(str(waiting)), waking.set())
        upstream: Any = Upstream(generator, generator, settings)
        info = await upstream.serve_policy(context, "models/b", RECIPE, trial=True)
        assert (info.version, info.trial) == ("models/b", True)
        assert "a change is still under way (trainer had the device)" in told[0]
        await generator.close()


class Waits:
    """A job's context that hands on what its handler says it waits for."""

    told: Any

    def progress(self, waiting: str | None = None) -> None:
        self.told(waiting)


async def test_a_candidate_on_trial_is_on_trial_again_after_a_turn(gateway: Gateway) -> None:
    await gateway.load("b", trial=True)
    await gateway.lent()
    await gateway.give_back()
    await served(gateway)
    assert (await gateway.info()).trial
    waiting = asyncio.create_task(gateway.chat())
    assert (await gateway.rollouts("models/b", prompts(1))).status_code == 200
    assert not waiting.done()
    await gateway.load("a")
    assert (await waiting).headers["x-policy-version"] == "models/a"


async def test_a_vllm_without_sleep_mode_is_paused_and_says_that_it_frees_nothing(gateway: Gateway) -> None:
    gateway.policy.description = gateway.policy.description.model_copy(update={"sleep_mode": False})  # type: ignore[union-attr]
    assert (await gateway.lent()).engine == "idle"
    assert gateway.vllm.paused
    await gateway.give_back()
    await served(gateway)


# --- who gets it


async def test_a_renewal_by_the_holder_extends_the_lease_without_touching_vllm(gateway: Gateway) -> None:
    first = await gateway.lent(seconds=SECONDS)
    again = await gateway.lent(seconds=60)
    assert (again.id, gateway.vllm.calls) == (first.id, ["sleep"])
    assert again.seconds_left > 55


async def test_another_holder_is_refused_and_told_who_holds_the_device(gateway: Gateway) -> None:
    await gateway.lent("trainer-1")
    for refused in (await gateway.lend("trainer-2"), await gateway.give_back("trainer-2")):
        assert (refused.status_code, refused.json()["code"]) == (409, "device-leased")
        assert "trainer-1 holds the device" in detail(refused)
        assert int(refused.headers["retry-after"]) > 0
    assert (await gateway.info()).state == "asleep"


async def test_giving_back_what_nobody_holds_changes_nothing(gateway: Gateway) -> None:
    assert (await gateway.give_back()).json()["state"] == "serving"
    assert gateway.vllm.calls == []


async def test_two_askings_of_one_holder_at_once_are_one_lease(gateway: Gateway) -> None:
    first, second = await asyncio.gather(gateway.lent(), gateway.lent())
    assert (first.id, gateway.vllm.calls) == (second.id, ["sleep"])


async def test_a_generator_that_does_not_share_refuses_for_good_and_says_what_to_set(store: Path) -> None:
    async with run_gateway(store) as gateway:
        await gateway.load("a")
        refused = await gateway.lend()
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert "RATCHET_GENERATOR_SLEEP" in detail(refused)
        assert "RATCHET_TRAINER_GENERATOR_URL" in detail(refused)
        assert (await gateway.chat()).status_code == 200


async def test_a_lease_renewed_too_seldom_for_the_grace_is_refused(gateway: Gateway) -> None:
    refused = await gateway.lend(seconds=90)
    assert (refused.status_code, refused.json()["field"]) == (422, "seconds")
    assert "RATCHET_GENERATOR_LEASE_GRACE_SECONDS" in detail(refused)


@pytest.mark.parametrize("body", [{"holder": "", "seconds": 9}, {"holder": "t", "seconds": 0}, {"holder": "t"}, {}])
async def test_a_bad_request_for_a_lease_names_its_field(gateway: Gateway, body: dict[str, Any]) -> None:
    headers = {"Authorization": "Bearer test-token-of-the-generator"}
    refused = await gateway.client.put("/v1/device/lease", json=body, headers=headers)
    assert refused.status_code == 422
    assert refused.json()["field"] in ("holder", "seconds")


async def test_the_lease_needs_the_token(gateway: Gateway) -> None:
    for method in ("PUT", "DELETE"):
        assert (await gateway.client.request(method, "/v1/device/lease", json={})).status_code == 401


# --- draining


async def test_a_lease_waits_for_running_rollouts_and_breaks_none_off(gateway: Gateway) -> None:
    gateway.vllm.hold = hold = asyncio.Event()
    rollouts = asyncio.create_task(gateway.rollouts("models/a", prompts(2)))
    await eventually(lambda: gateway.vllm.running > 0)
    lease = asyncio.create_task(gateway.lend())
    await eventually(lambda: gateway.policy.leases.held is not None)
    assert gateway.vllm.calls == []
    hold.set()
    assert len(lines_of(await rollouts)) == 2
    assert (await lease).status_code == 200
    assert gateway.vllm.calls == ["sleep"]


async def test_rollouts_that_take_too_long_keep_the_device_and_the_refusal_can_be_retried(store: Path) -> None:
    async with run_gateway(store, **SLEEPER, generator_rollout_wait_seconds=0.02) as gateway:
        gateway.policy.leases._grace_until = 0.0
        await gateway.load("a")
        gateway.vllm.hold = hold = asyncio.Event()
        rollouts = asyncio.create_task(gateway.rollouts("models/a", prompts(1)))
        await eventually(lambda: gateway.vllm.running > 0)
        refused = await gateway.lend("trainer-1")
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert "1 rollout requests still ran" in detail(refused)
        assert (await gateway.info()).lease is None
        hold.set()
        assert lines_of(await rollouts)[0].rollout is not None
        assert (await gateway.chat()).status_code == 200
        assert (await gateway.lent("trainer-2")).engine == "asleep"


async def test_an_outside_request_that_has_sent_nothing_is_taken_back_and_answered_after_the_turn(
    gateway: Gateway,
) -> None:
    gateway.vllm.hold = hold = asyncio.Event()
    asked = asyncio.create_task(gateway.chat())
    await eventually(lambda: gateway.vllm.running == 1)
    assert (await gateway.lent()).engine == "asleep"
    assert gateway.vllm.running == 0
    hold.set()
    await gateway.give_back()
    assert (await asked).status_code == 200


async def test_a_stream_that_has_begun_is_finished_before_vllm_sleeps(gateway: Gateway) -> None:
    gateway.vllm.token_seconds = 0.02
    async with gateway.client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        pieces = response.aiter_raw()
        await anext(pieces)
        lease = asyncio.create_task(gateway.lend())
        rest = [piece async for piece in pieces]
    assert b"[DONE]" in rest[-1]
    assert (await lease).status_code == 200
    assert gateway.vllm.disturbed == []


async def test_a_change_of_the_policy_is_waited_for(gateway: Gateway) -> None:
    put, lease = await asyncio.gather(gateway.put("b"), gateway.lend())
    assert (put.status_code, lease.status_code) == (200, 200)
    assert (await gateway.info()).version == "models/b"
    assert gateway.vllm.calls[-1] == "sleep"


# --- holders that go away


async def test_a_lease_that_is_not_renewed_runs_out_and_the_policy_is_served_again(gateway: Gateway) -> None:
    expired = REGISTRY.get_sample_value("ratchet_generator_leases_total", {"outcome": "expired"}) or 0
    await gateway.lent(seconds=SECONDS)
    assert (await gateway.chat()).status_code == 200
    assert gateway.vllm.calls == ["sleep", "wake", "reset", "prove"]
    assert REGISTRY.get_sample_value("ratchet_generator_leases_total", {"outcome": "expired"}) == expired + 1


async def test_a_holder_that_comes_back_too_late_gets_another_lease_and_can_tell(gateway: Gateway) -> None:
    first = await gateway.lent(seconds=SECONDS)
    await served(gateway)
    assert (await gateway.lent()).id != first.id


async def test_a_lease_given_back_before_it_was_granted_ends_at_once(gateway: Gateway) -> None:
    gateway.vllm.slumber = asyncio.Event()
    lease = asyncio.create_task(gateway.lend())
    await eventually(lambda: gateway.vllm.calls == ["sleep"])
    assert (await gateway.give_back()).status_code == 200
    gateway.vllm.slumber.set()
    assert (await lease).status_code == 409
    await served(gateway)
    assert gateway.vllm.calls == ["sleep", "wake", "reset", "prove"]


async def test_a_holder_that_gives_up_while_rollouts_run_does_not_put_vllm_to_sleep(gateway: Gateway) -> None:
    gateway.vllm.hold = hold = asyncio.Event()
    rollouts = asyncio.create_task(gateway.rollouts("models/a", prompts(1)))
    await eventually(lambda: gateway.vllm.running > 0)
    lease = asyncio.create_task(gateway.lend())
    await eventually(lambda: gateway.policy.leases.held is not None)
    lease.cancel()
    await gateway.give_back()
    hold.set()
    assert lines_of(await rollouts)[0].rollout is not None
    assert (await gateway.chat()).status_code == 200
    assert gateway.vllm.calls == []


async def test_a_holder_that_went_away_while_the_policy_changed_gets_no_lease(gateway: Gateway) -> None:
    away = False

    async def gone() -> bool:
        nonlocal away
        before, away = away, True  # here when it asks, gone when the change is over
        return before

    gateway.vllm.hold = hold = asyncio.Event()
    rollouts = asyncio.create_task(gateway.rollouts("models/a", prompts(1)))
    await eventually(lambda: gateway.vllm.running > 0)
    put = asyncio.create_task(gateway.put("b"))  # waits for the rollout
    await eventually(lambda: gateway.policy.changing)
    turns = Turns(make_settings(gateway.store, generator_sleep=True), gateway.policy)
    lease = asyncio.create_task(turns.lend(LeaseRequest(holder="trainer", seconds=60), gone))
    await eventually(lambda: away)
    hold.set()
    with pytest.raises(Conflict, match="went away"):
        await lease
    assert lines_of(await rollouts)[0].rollout is not None
    assert (await put).json()["version"] == "models/b"
    assert (await gateway.info()).lease is None
    assert "sleep" not in gateway.vllm.calls


def leaver() -> tuple[asyncio.Event, Callable[[], Awaitable[bool]]]:
    """Somebody who asks, and is gone once the event is set."""
    left = asyncio.Event()

    async def gone() -> bool:
        return left.is_set()

    return left, gone


async def test_a_holder_that_goes_away_while_vllm_falls_asleep_leaves_no_sleeper(gateway: Gateway) -> None:
    gateway.vllm.slumber = asyncio.Event()
    left, gone = leaver()
    turns = Turns(make_settings(gateway.store, generator_sleep=True), gateway.policy)
    lease = asyncio.create_task(turns.lend(LeaseRequest(holder="trainer", seconds=60), gone))
    await eventually(lambda: gateway.vllm.calls == ["sleep"])
    left.set()
    gateway.vllm.slumber.set()
    with pytest.raises(Conflict, match="went away"):
        await lease
    assert (await gateway.info()).lease is None
    await served(gateway)
    assert gateway.vllm.calls == ["sleep", "wake", "reset", "prove"]
    await turns.close()


async def test_a_holder_that_goes_away_while_rollouts_run_for_too_long_gets_no_lease_either(store: Path) -> None:
    settings = {**SLEEPER, "generator_put_wait_seconds": 0.05}
    async with run_gateway(store, **settings, generator_lease_grace_seconds=GRACE_SECONDS) as gateway:
        await eventually(lambda: gateway.policy.leases.blocked() is None)
        gateway.policy.leases._grace_seconds = 30.0
        await gateway.put("a")
        await served(gateway)
        gateway.vllm.calls.clear()
        gateway.vllm.hold = hold = asyncio.Event()
        rollouts = asyncio.create_task(gateway.rollouts("models/a", prompts(1)))
        await eventually(lambda: gateway.vllm.running > 0)
        left, gone = leaver()
        turns = Turns(make_settings(store, **settings), gateway.policy)
        lease = asyncio.create_task(turns.lend(LeaseRequest(holder="trainer", seconds=60), gone))
        await eventually(lambda: gateway.policy.leases.held is not None)
        left.set()
        with pytest.raises(Conflict, match="went away"):
            await lease
        hold.set()
        assert lines_of(await rollouts)[0].rollout is not None
        await eventually(lambda: gateway.policy.leases.held is None and gateway.policy.state == "serving")
        assert gateway.vllm.calls == []
        await turns.close()


async def test_a_holder_that_went_away_and_asked_again_keeps_what_its_second_asking_got(gateway: Gateway) -> None:
    gateway.vllm.slumber = asyncio.Event()
    left, gone = leaver()
    turns = Turns(make_settings(gateway.store, generator_sleep=True), gateway.policy)
    looks = 0
    resumed = asyncio.Event()

    async def slow_to_see() -> bool:
        nonlocal looks
        looks += 1
        if looks > 1:
            await resumed.wait()
        return await gone()

    first = asyncio.create_task(turns.lend(LeaseRequest(holder="trainer", seconds=60), slow_to_see))
    await eventually(lambda: gateway.vllm.calls == ["sleep"])
    left.set()
    second = asyncio.create_task(gateway.lent("trainer"))
    gateway.vllm.slumber.set()
    lease = await second
    resumed.set()
    with pytest.raises(Conflict, match="went away"):
        await first
    assert ((await gateway.info()).lease or lease).id == lease.id
    assert (await gateway.info()).state == "asleep"
    await turns.close()


# --- engines that fail


async def test_a_vllm_that_cannot_sleep_is_ended_for_the_device_was_promised(gateway: Gateway) -> None:
    gateway.vllm.sleep_error = "AssertionError: Memory usage increased after sleeping."
    assert (await gateway.lent()).engine == "absent"
    assert gateway.engine.died.is_set()
    assert (await gateway.info()).state == "asleep"
    assert len(gateway.engines.started) == 1
    await gateway.give_back()
    await served(gateway)
    assert len(gateway.engines.started) == 2
    assert gateway.vllm.calls == ["prove"]
    assert (await gateway.chat()).status_code == 200


async def test_a_vllm_that_dies_asleep_is_not_started_beside_the_training_but_after_it(gateway: Gateway) -> None:
    await gateway.lent(seconds=60)
    gateway.engine.kill()
    for _ in range(3):
        await Watcher(gateway.policy, make_settings(gateway.store))._round()
    assert (await gateway.info()).state == "asleep"
    assert len(gateway.engines.started) == 1
    await gateway.give_back()
    await served(gateway)
    assert (await gateway.info()).engine_starts == 2
    assert (await gateway.chat()).headers["x-policy-version"] == "models/a"


async def test_a_watcher_that_began_to_look_before_the_turn_starts_no_vllm_in_it(gateway: Gateway) -> None:
    watcher = Watcher(gateway.policy, make_settings(gateway.store, generator_health_interval_seconds=20))
    looking = asyncio.create_task(watcher._round())
    await asyncio.sleep(0)
    await gateway.lent()
    gateway.engine.kill()
    await looking
    assert ((await gateway.info()).state, len(gateway.engines.started)) == ("asleep", 1)


async def test_a_vllm_that_does_not_wake_is_started_anew_and_proven(gateway: Gateway) -> None:
    await gateway.lent()
    gateway.vllm.wake_error = "CUDA Error: out of memory"
    await gateway.give_back()
    await eventually(lambda: len(gateway.engines.started) == 2 and gateway.policy.state == "serving")
    assert gateway.vllm.calls == ["prove"]


async def test_a_vllm_that_wakes_with_other_weights_answers_nobody_and_is_started_anew(gateway: Gateway) -> None:
    await gateway.lent()
    old = gateway.vllm
    old.noise = 1.0
    waiting = asyncio.create_task(gateway.chat())
    await gateway.give_back()
    await eventually(lambda: len(gateway.engines.started) == 2 and gateway.policy.state == "serving")
    await waiting
    assert (old.most_running, old.calls[-1]) == (0, "prove")
    assert (await gateway.chat()).status_code == 200


async def test_when_no_start_succeeds_after_a_turn_the_gate_stays_shut_and_readiness_says_why(
    gateway: Gateway,
) -> None:
    await gateway.lent("trainer-1")
    gateway.vllm.wake_error = "CUDA Error: out of memory"
    gateway.engines.fail_starts = ["torch.OutOfMemoryError"] * 10
    await gateway.give_back("trainer-1")
    await eventually(lambda: gateway.policy.state == "failed")
    ready = await gateway.client.get("/health/ready")
    assert "torch.OutOfMemoryError" in detail(ready)
    assert (await gateway.chat()).status_code == 503
    gateway.engines.fail_starts = []
    assert (await gateway.load("b")).state == "serving"


# --- a generator restarted while its device is leased


async def test_a_restarted_generator_does_not_start_vllm_before_the_holder_could_renew(store: Path) -> None:
    settings = {**SLEEPER, "generator_lease_grace_seconds": 30.0, "generator_policy": "models/a"}
    async with run_gateway(store, **settings) as gateway:
        ready = await gateway.client.get("/health/ready")
        assert "RATCHET_GENERATOR_LEASE_GRACE_SECONDS" in detail(ready)
        assert detail(ready).startswith("empty: ")
        assert (await gateway.lent("trainer-1")).engine == "absent"
        assert (await gateway.info()).state == "asleep"
        assert gateway.engines.started == []
        await gateway.give_back("trainer-1")
        await served(gateway)
        assert (await gateway.info()).version == "models/a"
        assert len(gateway.engines.started) == 1


async def test_without_a_holder_vllm_starts_when_the_grace_is_over(store: Path) -> None:
    async with run_gateway(store, **SLEEPER, generator_lease_grace_seconds=GRACE_SECONDS) as gateway:
        put = asyncio.create_task(gateway.put("a"))
        refused = await gateway.chat()
        assert (refused.status_code, gateway.engines.started) == (503, [])
        assert (await put).json()["state"] == "serving"


async def test_a_generator_that_does_not_share_its_device_starts_without_a_grace(store: Path) -> None:
    async with run_gateway(store, generator_lease_grace_seconds=600) as gateway:
        assert (await gateway.load("a")).state == "serving"


async def test_after_a_turn_a_generator_that_served_nothing_is_as_it_was(store: Path) -> None:
    async with run_gateway(store, **SLEEPER) as gateway:
        await gateway.lent()
        await gateway.give_back()
        await eventually(lambda: gateway.policy.state == "empty")
        assert "PUT /v1/policy" in detail(await gateway.client.get("/health/ready"))
        assert (await gateway.load("a")).state == "serving"


async def test_stopping_while_asleep_ends_vllm_and_everything_else(store: Path) -> None:
    async with run_gateway(store, **SLEEPER, generator_lease_grace_seconds=GRACE_SECONDS) as gateway:
        await gateway.load("a")
        gateway.policy.leases._grace_seconds = 30.0
        await gateway.lent()
        engine = gateway.engine
    assert engine.died.is_set()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
