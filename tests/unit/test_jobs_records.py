"""The pure parts of the job queue: settings, records, scripts."""

import re

import pytest
from pydantic import ValidationError

from services.contracts.jobs import JobState
from services.platform.jobs import JobContext, JobSettings, connect
from services.platform.jobs.outage import Outage
from services.platform.jobs.records import Keys, encode, event_from, job_from, outcome_from
from services.platform.jobs.scripts import SCRIPTS

IN_REDIS_6_2 = {
    *("EXISTS", "HDEL", "HGETALL", "HINCRBY", "HMGET", "HSET", "INFO", "TIME"),
    *("XACK", "XADD", "XCLAIM", "XDEL", "XGROUP", "XINFO", "XPENDING", "XRANGE"),
    *("ZADD", "ZRANGE", "ZRANGEBYSCORE", "ZREM"),
}

RECORD = {
    "id": "run/iter-1/score/3",
    "queue": "score",
    "kind": "score_chunk",
    "payload": '{"chunk":3}',
    "topic": "run",
    "max_attempts": "4",
    "state": "queued",
    "fence": "2",
    "attempts": "1",
    "cancel": "0",
    "enqueued_at": "1795503738.000123",
}


def test_equal_payloads_are_written_as_equal_strings_whatever_the_order_of_keys() -> None:
    assert encode({"b": [1, 2], "a": {"y": 1, "x": "é"}}) == encode({"a": {"x": "é", "y": 1}, "b": [1, 2]})


def test_a_value_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        encode({"a": object()})


def test_a_job_that_never_ran_has_no_worker_result_or_times() -> None:
    job = job_from(RECORD)
    assert (job.state, job.fence, job.attempts, job.payload) == (JobState.QUEUED, 2, 1, {"chunk": 3})
    assert (job.worker, job.result, job.problem, job.progress, job.started_at, job.finished_at) == (None,) * 6
    assert job.enqueued_at == 1795503738.000123


def test_a_failed_job_carries_its_problem() -> None:
    problem = '{"type":"t","title":"T","status":502,"detail":"d","code":"score-invalid"}'
    job = job_from({**RECORD, "state": "failed", "problem": problem, "finished_at": "2.5"})
    assert job.problem is not None
    assert (job.problem.code, job.problem.status, job.finished_at) == ("score-invalid", 502, 2.5)


def test_an_event_takes_its_time_from_redis_clock_in_its_id() -> None:
    event = event_from("run", "1795503738068-2", {"type": "run.paused", "job_id": "", "kind": "", "data": "{}"})
    assert (event.at, event.id, event.job_id, event.kind) == (1795503738.068, "1795503738068-2", None, None)


def test_a_nudge_names_no_job() -> None:
    assert outcome_from({"job_id": "", "topic": "run", "state": "queued"}).job_id == ""


def test_every_key_starts_with_the_prefix() -> None:
    keys = Keys("site-a")
    for key in (keys.job("j"), keys.queue("q"), keys.delayed("q"), keys.jobs("q"), keys.events("t"), keys.inbox):
        assert key.startswith("site-a:")


def test_retries_wait_one_two_four_seconds_up_to_the_limit() -> None:
    settings = JobSettings(retry_max_seconds=5)
    assert [settings.retry_delay_seconds(n) for n in (1, 2, 3, 4, 60)] == [1, 2, 4, 5, 5]


def test_a_heartbeat_too_slow_for_the_lease_is_refused() -> None:
    with pytest.raises(ValidationError, match="at most a third of lease_seconds"):
        JobSettings(lease_seconds=2, heartbeat_seconds=1)


def test_progress_figures_are_merged_and_sent_once() -> None:
    context = JobContext(job_from(RECORD), 2)
    assert context.take_unsent() is None
    context.progress(done=1, of=8)
    context.progress(done=2)
    assert context.take_unsent() == {"done": 2, "of": 8}
    assert context.take_unsent() is None


def test_progress_that_did_not_reach_redis_is_sent_again() -> None:
    context = JobContext(job_from(RECORD), 2)
    context.progress(done=1)
    assert context.take_unsent() == {"done": 1}
    context.put_back()
    assert context.take_unsent() == {"done": 1}


async def test_the_back_off_doubles_up_to_its_limit() -> None:
    outage = Outage(await connect("redis://127.0.0.1:1/0"), longest_delay_seconds=1.0)
    assert [outage.delay_seconds(n) for n in (1, 2, 3, 4, 5, 99)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


async def test_the_server_is_named_without_its_password() -> None:
    outage = Outage(await connect("redis://:secret@redis.example:6380/0"), longest_delay_seconds=1.0)
    assert outage.server == "redis.example:6380"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_use_no_command_that_valkey_or_redis_6_2_lacks(name: str) -> None:
    used = set(re.findall(r"redis\.call\('([A-Z]+)'", SCRIPTS[name]))
    assert used
    assert used - IN_REDIS_6_2 == set()
