"""Batches across requests: by length, within budget, nobody starves, one bad sequence fails alone."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.errors import InvalidInput, Overloaded, RatchetError, ScoreInvalid, Unavailable
from services.reward.batching import BatchLimits, BatchQueue, plan_batch
from services.reward.scorers import TokenSequence, group_values
from tests.fixtures.reward import FakeScorer


def sequences(*lengths: int, first: int = 0) -> list[TokenSequence]:
    return [TokenSequence([first + i] * n, f"items.{i}.responses.0") for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 1000), st.integers(1, 20))
def test_the_next_batch_holds_the_oldest_sequence_and_keeps_both_limits(
    lengths: list[int], tokens: int, size: int
) -> None:
    batch = plan_batch(lengths, BatchLimits(batch_tokens=tokens, batch_sequences=size))
    assert 0 in batch
    assert len(set(batch)) == len(batch) <= size
    assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens


def test_a_batch_is_filled_with_the_sequences_nearest_in_length() -> None:
    assert sorted(plan_batch([10, 100, 11, 99, 9, 98], BatchLimits(batch_tokens=300))) == [0, 2, 4]


def test_a_sequence_longer_than_the_budget_goes_alone() -> None:
    assert plan_batch([500, 10, 490], BatchLimits(batch_tokens=100)) == [0]


@pytest.fixture
async def queue() -> AsyncIterator[BatchQueue]:
    queue = BatchQueue(BatchLimits(batch_tokens=100, queued_tokens=200))
    yield queue
    queue.close()


async def entered(scorer: FakeScorer) -> None:
    assert await asyncio.to_thread(scorer.entered.wait, 10)


async def test_concurrent_requests_share_batches_and_get_their_own_values_in_order(queue: BatchQueue) -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    first = asyncio.create_task(queue.submit(scorer, sequences(5)))
    await entered(scorer)
    others = [asyncio.create_task(queue.submit(scorer, sequences(3, 20, first=10 * k))) for k in (1, 2, 3)]
    await asyncio.sleep(0)
    scorer.gate.set()
    assert await first == [0.0]
    assert await asyncio.gather(*others) == [[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]]
    assert scorer.batches == [[5], [20, 20, 20, 3, 3], [3]]  # three requests, two batches of at most 100 padded tokens


async def test_one_bad_sequence_fails_its_request_only(queue: BatchQueue) -> None:
    scorer = FakeScorer(bad=[21])
    scorer.gate.clear()
    first = asyncio.create_task(queue.submit(scorer, sequences(5)))
    await entered(scorer)
    good = asyncio.create_task(queue.submit(scorer, sequences(4, 4, 4, first=10)))
    bad = asyncio.create_task(queue.submit(scorer, sequences(4, 4, 4, first=20)))
    await asyncio.sleep(0)
    scorer.gate.set()
    assert await first == [0.0]
    assert await good == [10.0, 11.0, 12.0]
    with pytest.raises(RatchetError, match=r"items\.1\.responses\.0: scorer 'default' failed .* a bad token"):
        await bad


async def test_a_request_over_the_limit_is_refused_at_the_door_with_a_time_to_come_again(queue: BatchQueue) -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    running = asyncio.create_task(queue.submit(scorer, sequences(5)))
    await entered(scorer)
    waiting = asyncio.create_task(queue.submit(scorer, sequences(80, 80)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await queue.submit(scorer, sequences(41))
    assert refused.value.retry_after_seconds is not None
    assert refused.value.retry_after_seconds >= 1
    scorer.gate.set()
    assert await running == [0.0]
    assert await waiting == [0.0, 1.0]
    assert await queue.submit(scorer, sequences(41)) == [0.0]


async def test_a_request_larger_than_the_whole_queue_is_told_to_be_cut(queue: BatchQueue) -> None:
    with pytest.raises(InvalidInput, match="RATCHET_REWARD_MAX_QUEUED_TOKENS"):
        await queue.submit(FakeScorer(), sequences(150, 51))


async def test_what_waits_for_a_caller_that_has_gone_is_dropped(queue: BatchQueue) -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    running = asyncio.create_task(queue.submit(scorer, sequences(5)))
    await entered(scorer)
    gone = asyncio.create_task(queue.submit(scorer, sequences(90, 90)))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    last = asyncio.create_task(queue.submit(scorer, sequences(7, first=3)))  # fits only since the other was dropped
    await asyncio.sleep(0)
    scorer.gate.set()
    assert await running == [0.0]
    assert await last == [3.0]
    assert scorer.batches == [[5], [7]]


async def test_a_batch_that_never_ends_is_named() -> None:
    stuck = BatchQueue(BatchLimits(stuck_seconds=1e-9))
    scorer = FakeScorer("slow")
    scorer.gate.clear()
    assert stuck.trouble() is None
    task = asyncio.create_task(stuck.submit(scorer, sequences(5, 6)))
    await entered(scorer)
    trouble = stuck.trouble()
    assert trouble is not None
    assert "2 sequences (11 tokens) of scorer 'slow'" in trouble
    scorer.gate.set()
    assert await task == [0.0, 1.0]
    stuck.close()
    assert stuck.trouble() is None


async def test_stopping_answers_who_waits() -> None:
    queue = BatchQueue(BatchLimits())
    scorer = FakeScorer()
    scorer.gate.clear()
    running = asyncio.create_task(queue.submit(scorer, sequences(5)))
    await entered(scorer)
    waiting = asyncio.create_task(queue.submit(FakeScorer("other"), sequences(5)))
    await asyncio.sleep(0)
    closing = threading.Thread(target=queue.close)
    closing.start()
    with pytest.raises(Unavailable):
        await waiting
    scorer.gate.set()
    assert await running == [0.0]
    await asyncio.to_thread(closing.join, 10)
    with pytest.raises(Unavailable):
        await queue.submit(scorer, sequences(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_an_error_naming_item_and_response(value: float) -> None:
    places = [TokenSequence([1], f"items.{i}.responses.{j}") for i in range(2) for j in range(2)]
    with pytest.raises(ScoreInvalid) as error:
        group_values([0.0, 1.0, 2.0, value], places, [2, 2], "score", FakeScorer().info)
    assert error.value.field == "items.1.responses.1"
    with pytest.raises(ScoreInvalid, match="4 responses were sent and 3 came back"):
        group_values([0.0, 1.0, 2.0], places, [2, 2], "score", FakeScorer().info)


def test_values_come_back_in_the_shape_of_the_request() -> None:
    places = [TokenSequence([1], "") for _ in range(3)]
    assert group_values([1.0, 2.0, 3.0], places, [1, 2], "score", FakeScorer().info) == ((1.0,), (2.0, 3.0))
