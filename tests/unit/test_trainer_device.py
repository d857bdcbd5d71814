"""A job's turn on the generator's device, against the real generator's app over a fake vLLM."""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog
from pydantic import SecretStr

from services.contracts.device import LEASE_RENEWALS
from services.contracts.errors import Cancelled, Conflict, DeadlineExceeded, JobFailed
from services.contracts.jobs import Job
from services.contracts.training import TrainingProgress, TrainingResult
from services.platform.http import ServiceClient
from services.platform.jobs import JobContext
from services.platform.store import ArtifactStore
from services.trainer.device import PATH, DeviceLost, SharedDevice
from services.trainer.jobs import TrainingJobs
from services.trainer.process import TrainingChild
from services.trainer.protocol import ChildMessage
from services.trainer.settings import TrainerSettings
from tests.fixtures.fake_vllm import StreamingTransport
from tests.fixtures.generator import TOKEN, Gateway, eventually, fake_policy, group_members, run_gateway
from tests.fixtures.trainer import config

LEASE_SECONDS = 1.5
GENERATOR: dict[str, Any] = {"generator_sleep": True, "generator_lease_grace_seconds": 30.0}
JOB_ID = "run/iter-1/train"
PAYLOAD: dict[str, Any] = {
    "start": "models/a", "reference": "models/a", "pairs": ["p.parquet"], "output": "models/c", "config": config()
}  # fmt: skip
TRAINING = ChildMessage(type="progress", progress=TrainingProgress(phase="training", step=3, total_steps=9))
RESULT = ChildMessage(type="result", result=TrainingResult(checkpoint="models/c", version="models/c", seconds=1.0))
FAILURE = ChildMessage(type="error", problem=JobFailed("the loss is NaN").problem())

TELLS = "import sys, time; print({!r}, flush=True)\n"
WORKS = TELLS.format(TRAINING.model_dump_json(exclude_defaults=True)) + "time.sleep(600)"
"""Trains until it is ended."""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORKS
LEAVES_ONE = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
    "'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'], "
    "stdout=subprocess.DEVNULL)\n"
)
"""Its child is in its session, and outlives a polite end."""


def ends_with(message: ChildMessage) -> str:
    return TELLS.format(message.model_dump_json(exclude_defaults=True))


class Children:
    """A launcher whose training processes run a given program."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.started: list[TrainingChild] = []

    async def start(self, job_file: Path) -> TrainingChild:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", self.program,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        child = TrainingChild(process, tempfile.TemporaryFile())  # noqa: SIM115
        self.started.append(child)
        return child

    async def prepare_spare(self) -> None:
        return

    def alive(self) -> bool:
        return any(group_members(child.process.pid) for child in self.started)


class Line(httpx.AsyncBaseTransport):
    """The network between trainer and generator: it can be cut, and it can lead to a restarted generator."""

    def __init__(self) -> None:
        self.app: Any = None
        self.on_call: Callable[[str], None] = lambda method: None
        self.calls: list[str] = []
        self.hold: asyncio.Event | None = None
        """When set, a giving back waits for it on the way."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == PATH
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        self.calls.append(request.method)
        self.on_call(request.method)
        if request.method == "DELETE" and self.hold is not None:
            await self.hold.wait()
        if self.app is None:
            raise httpx.ConnectError("All connection attempts failed")
        return await StreamingTransport(self.app).handle_async_request(request)


class Site:
    """A generator, a trainer and the line between them."""

    def __init__(self, root: Path, stack: AsyncExitStack) -> None:
        self.root = root
        self.line = Line()
        self.gateway: Gateway
        self._stack = stack

    async def generator(self, **settings: Any) -> Gateway:
        """Start one that serves `a`; with none in it, a restarted one."""
        self.gateway = await self._stack.enter_async_context(run_gateway(self.root, **GENERATOR | settings))
        self.line.app = self.gateway.app
        return self.gateway

    async def serving(self) -> Gateway:
        gateway = await self.generator()
        gateway.policy.leases._grace_until = 0.0
        await gateway.load("a")
        return gateway

    def trainer(self, program: str, **settings: Any) -> TrainingJobs:
        chosen = TrainerSettings(
            **{
                "token": TOKEN, "store_url": str(self.root), "trainer_generator_url": "http://generator",
                "trainer_lease_seconds": LEASE_SECONDS, "trainer_term_seconds": 0.3,
            } | settings
        )  # fmt: skip
        client = ServiceClient(
            "generator", "http://generator", chosen.token, retry=False, transport=self.line
        )  # fmt: skip
        device = SharedDevice(chosen, client if chosen.trainer_generator_url else None)
        children: Any = Children(program)
        return TrainingJobs(chosen, ArtifactStore(str(self.root)), children, device)


@pytest.fixture(autouse=True)
def short_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a lease may be as short as a test can wait for."""
    monkeypatch.setattr("services.trainer.settings.END_SLACK_SECONDS", 0.1)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    fake_policy(tmp_path, "a", seed=1)
    async with AsyncExitStack() as stack:
        yield Site(tmp_path, stack)


def attempt(kind: str = "dpo", **payload: Any) -> JobContext:
    job = Job.model_validate(
        {
            "id": JOB_ID, "queue": "train", "kind": kind, "payload": payload or PAYLOAD, "topic": "run",
            "max_attempts": 4, "state": "running", "enqueued_at": 1.0,
        }
    )  # fmt: skip
    return JobContext(job, fence=1)


def children(trainer: TrainingJobs) -> Children:
    found: Any = trainer.launcher
    return found


async def until_training(context: JobContext) -> None:
    await eventually(lambda: (context.figures or {}).get("step") == 3, 20)


# --- a turn


async def test_vllm_sleeps_before_the_training_process_starts_and_wakes_after_it_ended(site: Site) -> None:
    gateway = await site.serving()
    trainer = site.trainer(ends_with(TRAINING) + ends_with(RESULT) + "time.sleep(600)")
    seen: list[tuple[str, str, bool]] = []
    site.line.on_call = lambda method: seen.append((method, gateway.policy.state, children(trainer).alive()))
    start = trainer.launcher.start

    async def started(job_file: Path) -> TrainingChild:
        seen.append(("start", gateway.policy.state, False))
        return await start(job_file)

    trainer.launcher.start = started
    assert (await trainer.run(attempt()))["version"] == "models/c"
    assert seen[0] == ("PUT", "serving", False)
    assert seen[1] == ("start", "asleep", False)
    assert seen[-1] == ("DELETE", "asleep", False)
    await eventually(lambda: gateway.policy.state == "serving")
    assert gateway.vllm.calls[-4:] == ["sleep", "wake", "reset", "prove"]


async def test_the_device_is_given_back_only_when_all_that_the_process_started_has_ended(site: Site) -> None:
    gateway = await site.serving()
    trainer = site.trainer(LEAVES_ONE + ends_with(RESULT))
    alive: list[bool] = []
    site.line.on_call = lambda method: alive.append(children(trainer).alive()) if method == "DELETE" else None
    await trainer.run(attempt())
    await eventually(lambda: gateway.policy.state == "serving")
    assert alive == [False]


async def test_until_the_process_is_gone_the_lease_is_kept_and_renewed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await site.serving()
    monkeypatch.setattr("services.trainer.device.HANDLER_WAIT_SECONDS", 0.0)
    gone = asyncio.Event()

    async def slowly(child: TrainingChild, seconds: float) -> bool:
        async with asyncio.timeout(seconds):
            return await gone.wait()

    monkeypatch.setattr(TrainingChild, "gone", slowly)
    trainer = site.trainer(ends_with(RESULT))
    await trainer.run(attempt())
    asked = len(site.line.calls)
    await eventually(lambda: len(site.line.calls) > asked)
    assert set(site.line.calls) == {"PUT"}
    assert gateway.policy.state == "asleep"
    gone.set()
    await eventually(lambda: gateway.policy.state == "serving")
    await trainer.device.close()


async def test_a_process_that_does_not_end_keeps_its_lease_for_as_long_as_it_takes_and_is_told_of(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await site.serving()
    monkeypatch.setattr("services.trainer.device.HANDLER_WAIT_SECONDS", 0.0)
    looks, ends = asyncio.Queue[None](), asyncio.Event()

    async def stuck(child: TrainingChild, seconds: float) -> bool:
        looks.put_nowait(None)
        try:
            async with asyncio.timeout(0.05):
                return await ends.wait()
        except TimeoutError:
            return False

    monkeypatch.setattr(TrainingChild, "gone", stuck)
    trainer = site.trainer(ends_with(RESULT))
    with structlog.testing.capture_logs() as logs:
        await trainer.run(attempt())
        for _ in range(3):
            await looks.get()
    told = [entry for entry in logs if entry["event"] == "training_process_does_not_end"]
    assert told[0]["log_level"] == "error"
    assert told[0]["child_pid"] == children(trainer).started[0].process.pid
    # renewed for longer than the lease that was there
    asked = len(site.line.calls)
    await eventually(lambda: len(site.line.calls) >= asked + 4)
    assert set(site.line.calls) == {"PUT"}
    assert gateway.policy.state == "asleep"
    # the next job neither starts beside it nor waits for ever
    trainer.device.settings = trainer.settings.model_copy(update={"trainer_lease_wait_seconds": 0.05})
    with pytest.raises(DeadlineExceeded, match="earlier training process did not end") as caught:
        await trainer.run(attempt())
    assert caught.value.retryable
    assert len(children(trainer).started) == 1
    ends.set()
    await eventually(lambda: gateway.policy.state == "serving")


async def test_a_trainer_stops_in_time_also_beside_a_process_that_does_not_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await site.serving()
    monkeypatch.setattr("services.trainer.device.HANDLER_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("services.trainer.device.CLOSE_SECONDS", 0.1)

    async def stuck(child: TrainingChild, seconds: float) -> bool:
        await asyncio.sleep(0.05)  # a look takes time
        return False

    monkeypatch.setattr(TrainingChild, "gone", stuck)
    trainer = site.trainer(ends_with(RESULT))
    await trainer.run(attempt())
    async with asyncio.timeout(5):
        await trainer.device.close()
    assert "DELETE" not in site.line.calls
    await eventually(lambda: gateway.policy.state == "serving")  # the lease ran out


async def test_a_failed_training_gives_the_device_back(site: Site) -> None:
    gateway = await site.serving()
    with pytest.raises(Exception, match="the loss is NaN"):
        await site.trainer(ends_with(FAILURE)).run(attempt())
    await eventually(lambda: gateway.policy.state == "serving")


async def test_a_cancelled_training_gives_the_device_back_once_its_stubborn_process_is_killed(site: Site) -> None:
    gateway = await site.serving()
    trainer = site.trainer(STUBBORN)
    context = attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)
    alive: list[bool] = []
    site.line.on_call = lambda method: alive.append(children(trainer).alive()) if method == "DELETE" else None
    context.cancelled.set()
    with pytest.raises(Cancelled):
        await running
    await eventually(lambda: gateway.policy.state == "serving")
    assert alive == [False]


async def test_a_handler_that_is_ended_by_force_gives_the_device_back_too(site: Site) -> None:
    gateway = await site.serving()
    context = attempt()
    running = asyncio.create_task(site.trainer(WORKS).run(context))
    await until_training(context)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await eventually(lambda: gateway.policy.state == "serving")


async def test_an_import_computes_on_the_cpu_and_takes_no_turn(site: Site) -> None:
    gateway = await site.serving()
    job = attempt("import_model", model_kind="policy", source="store:staging/x", output="models/c")
    await site.trainer(ends_with(RESULT)).run(job)
    assert (site.line.calls, gateway.policy.state) == ([], "serving")


@pytest.mark.parametrize("url", [None, ""])
async def test_a_trainer_with_a_device_of_its_own_asks_nobody(site: Site, url: str | None) -> None:
    gateway = await site.serving()
    await site.trainer(ends_with(RESULT), trainer_generator_url=url).run(attempt())
    assert (site.line.calls, gateway.policy.state) == ([], "serving")


def test_an_address_that_is_no_url_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match="http://generator:8001"):
        TrainerSettings(token=SecretStr(TOKEN), store_url="/nowhere", trainer_generator_url="generator:8001")


def test_a_lease_too_short_for_the_process_to_end_in_is_refused() -> None:
    with pytest.raises(ValueError, match="RATCHET_TRAINER_TERM_SECONDS"):
        TrainerSettings(token=SecretStr(TOKEN), store_url="/nowhere", trainer_lease_seconds=6, trainer_term_seconds=3)


@pytest.mark.parametrize("term", [3.0, 18.0, 20.0])
def test_the_longest_end_of_a_process_leaves_slack_before_its_lease_ends(
    monkeypatch: pytest.MonkeyPatch, term: float
) -> None:
    monkeypatch.setattr("services.trainer.settings.END_SLACK_SECONDS", 2.0)
    values: dict[str, Any] = {"token": TOKEN, "store_url": "/nowhere", "trainer_lease_seconds": 60}
    if 3 * (term + 2.0) > 60:
        with pytest.raises(ValueError, match="allow 66 s or more"):
            TrainerSettings(**values, trainer_term_seconds=term)
        return
    settings = TrainerSettings(**values, trainer_term_seconds=term)
    assert SharedDevice(settings)._margin == term + 2.0 <= settings.trainer_lease_seconds / LEASE_RENEWALS


# --- waiting for it


async def test_a_job_waits_for_its_turn_says_for_whom_and_then_trains(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await site.serving()
    await gateway.lent("trainer-2 for other/train")
    monkeypatch.setattr("services.trainer.device.MOST_PAUSE_SECONDS", 0.02)
    context = attempt()
    running = asyncio.create_task(site.trainer(ends_with(RESULT)).run(context))
    await eventually(lambda: bool((context.figures or {}).get("waiting")))
    assert context.figures is not None
    assert context.figures["waiting"].startswith("waiting for the device: trainer-2 for other/train holds the device")
    # what is told of a job must be readable by those who follow it
    assert TrainingProgress.model_validate(context.figures).phase == "starting"
    await gateway.give_back("trainer-2 for other/train")
    await running
    assert context.figures["waiting"] is None


async def test_a_job_that_waits_is_cancelled_at_once_and_leaves_no_lease(site: Site) -> None:
    gateway = await site.serving()
    await gateway.lent("trainer-2")
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await eventually(lambda: bool((context.figures or {}).get("waiting")))
    context.cancelled.set()
    with pytest.raises(Cancelled):
        async with asyncio.timeout(3):
            await running
    assert children(trainer).started == []
    assert (await gateway.info()).lease.holder == "trainer-2"  # type: ignore[union-attr]


async def test_a_job_cancelled_while_vllm_falls_asleep_leaves_no_sleeper(site: Site) -> None:
    gateway = await site.serving()
    gateway.vllm.slumber = asyncio.Event()
    context = attempt()
    running = asyncio.create_task(site.trainer(WORKS).run(context))
    await eventually(lambda: "sleep" in gateway.vllm.calls)
    context.cancelled.set()
    with pytest.raises(Cancelled):
        async with asyncio.timeout(3):
            await running
    gateway.vllm.slumber.set()
    await eventually(lambda: gateway.policy.state == "serving")
    assert gateway.vllm.calls[-4:] == ["sleep", "wake", "reset", "prove"]


async def test_the_wait_for_the_device_is_bounded_and_names_its_setting(site: Site) -> None:
    gateway = await site.serving()
    await gateway.lent("trainer-2")
    with pytest.raises(DeadlineExceeded, match=r"RATCHET_TRAINER_LEASE_WAIT_SECONDS\): trainer-2 holds") as caught:
        await site.trainer(WORKS, trainer_lease_wait_seconds=0.05).run(attempt())
    assert caught.value.retryable


async def test_a_generator_out_of_reach_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.trainer.device.PAUSE_SECONDS", 0.02)
    context = attempt()
    running = asyncio.create_task(site.trainer(ends_with(RESULT)).run(context))
    await eventually(lambda: "cannot be reached" in str((context.figures or {}).get("waiting")))
    await site.serving()
    await running


async def test_a_generator_that_does_not_share_fails_the_job_at_once_with_the_remedy(site: Site) -> None:
    gateway = await site.generator(generator_sleep=False)
    await gateway.load("a")
    with pytest.raises(Conflict, match="RATCHET_GENERATOR_SLEEP") as caught:
        await site.trainer(WORKS).run(attempt())
    assert not caught.value.retryable


# --- keeping it


async def test_the_lease_is_renewed_for_as_long_as_the_process_runs(site: Site) -> None:
    gateway = await site.serving()
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)
    # three leases' worth of renewals
    await eventually(lambda: site.line.calls.count("PUT") >= 9, 30)
    assert gateway.policy.state == "asleep"
    assert gateway.vllm.calls.count("sleep") == 1
    assert not running.done()
    context.cancelled.set()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_restarted_generator_is_leased_again_and_the_training_goes_on(site: Site) -> None:
    await site.serving()
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)
    site.line.app = None
    restarted = await site.generator(generator_policy="models/a")
    await eventually(lambda: restarted.policy.state == "asleep")
    assert restarted.engines.started == []
    assert children(trainer).alive()
    context.cancelled.set()
    with pytest.raises(Cancelled):
        await running
    await eventually(lambda: restarted.policy.state == "serving")


async def test_a_lease_that_cannot_be_renewed_ends_the_process_before_the_generator_wakes(site: Site) -> None:
    gateway = await site.serving()
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)
    site.line.app = None
    seen: list[tuple[str, bool]] = []
    site.line.on_call = lambda method: (
        seen.append((gateway.policy.state, children(trainer).alive())) if method == "DELETE" else None
    )
    with pytest.raises(DeviceLost, match=r"lost at step 3.*last save.*cannot be reached") as caught:
        await running
    assert caught.value.retryable
    assert seen[0] == ("asleep", False)
    await eventually(lambda: gateway.policy.state == "serving")


async def test_a_device_that_another_holds_ends_the_process_at_once(site: Site) -> None:
    gateway = await site.serving()
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)
    assert gateway.policy.leases.held is not None
    gateway.policy.leases.held.holder = "trainer-2"
    with pytest.raises(DeviceLost, match="trainer-2 holds the device"):
        await running
    assert not children(trainer).alive()
    assert gateway.policy.leases.held.holder == "trainer-2"


async def test_a_keeper_that_fails_in_a_way_nobody_foresaw_loses_the_device_and_ends_the_process(site: Site) -> None:
    gateway = await site.serving()
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)

    def broken(method: str) -> None:
        if method == "PUT":
            raise ZeroDivisionError("a defect")

    site.line.on_call = broken
    with pytest.raises(DeviceLost, match="ZeroDivisionError: a defect") as caught:
        async with asyncio.timeout(10):
            await running
    assert caught.value.retryable
    assert not children(trainer).alive()
    await eventually(lambda: gateway.policy.state == "serving")


async def test_a_trainer_that_stood_still_for_longer_than_its_lease_does_not_go_on(site: Site) -> None:
    await site.serving()
    trainer = site.trainer(WORKS)
    async with trainer.device.turn(attempt()) as turn:
        turn.until = asyncio.get_running_loop().time() - 1
        async with asyncio.timeout(10):
            await turn.lost.wait()
        assert "stood still" in turn.cause


async def test_a_generator_that_misses_a_renewal_costs_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await site.serving()
    monkeypatch.setattr("services.trainer.device.PAUSE_SECONDS", 0.02)
    trainer, context = site.trainer(WORKS), attempt()
    running = asyncio.create_task(trainer.run(context))
    await until_training(context)
    site.line.app = None
    asked = len(site.line.calls)
    await eventually(lambda: len(site.line.calls) > asked + 1)
    site.line.app = gateway.app
    asked = len(site.line.calls)
    await eventually(lambda: len(site.line.calls) > asked + 2)
    assert not running.done()
    context.cancelled.set()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_next_attempt_s_lease_is_not_ended_by_the_giving_back_of_the_one_before(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await site.serving()
    monkeypatch.setattr("services.trainer.device.HANDLER_WAIT_SECONDS", 0.0)
    site.line.hold = asyncio.Event()
    trainer = site.trainer(ends_with(RESULT))
    await trainer.run(attempt())
    await eventually(lambda: site.line.calls == ["PUT", "DELETE"])
    context = attempt()
    trainer.launcher = Children(WORKS)  # type: ignore[assignment]
    asked = asyncio.Event()
    turn = trainer.device.turn

    def asking(context: JobContext) -> Any:
        asked.set()
        return turn(context)

    trainer.device.turn = asking
    running = asyncio.create_task(trainer.run(context))
    await asked.wait()
    assert site.line.calls == ["PUT", "DELETE"]
    site.line.hold.set()
    await until_training(context)
    assert site.line.calls[:3] == ["PUT", "DELETE", "PUT"]
    assert gateway.policy.state == "asleep"
    context.cancelled.set()
    await asyncio.gather(running, return_exceptions=True)
    await trainer.device.close()
