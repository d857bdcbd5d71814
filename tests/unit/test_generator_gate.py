"""The request gate."""

import asyncio

import pytest

from services.contracts.errors import Overloaded, Unavailable
from services.generator.gate import Gate


def make_gate(*, wait: float = 1.0, trial: float = 1.0, outside: int = 10) -> Gate:
    return Gate(wait_seconds=wait, trial_wait_seconds=trial, max_outside=outside, max_rollouts=2)


async def test_nothing_passes_before_a_policy_is_loaded() -> None:
    with pytest.raises(Unavailable, match="no policy is loaded"):
        await make_gate().enter("outside")


async def test_a_ticket_names_the_version_that_was_served_when_it_was_given() -> None:
    gate = make_gate()
    gate.open("v1")
    assert (await gate.enter("outside")).version == "v1"


async def test_requests_wait_at_a_closed_gate_and_pass_to_the_new_version() -> None:
    gate = make_gate()
    gate.open("v1")
    gate.close("swap")
    waiting = [asyncio.create_task(gate.enter(traffic)) for traffic in ("outside", "rollouts")]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    gate.open("v2")
    assert {(await task).version for task in waiting} == {"v2"}


async def test_a_wait_is_bounded_and_says_why_it_was() -> None:
    gate = make_gate(wait=0.01)
    gate.open("v1")
    gate.close("the policy is being swapped")
    with pytest.raises(Unavailable, match="being swapped") as caught:
        await gate.enter("outside")
    assert caught.value.retry_after_seconds


async def test_during_a_trial_rollouts_pass_and_outside_requests_wait_for_its_end() -> None:
    gate = make_gate()
    gate.open("v2", hold_outside=True)
    assert (await gate.enter("rollouts")).version == "v2"
    waiting = asyncio.create_task(gate.enter("outside"))
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.open("v1")
    assert (await waiting).version == "v1"


async def test_closing_for_rollouts_during_a_trial_does_not_let_outside_requests_in() -> None:
    gate = make_gate(wait=0.01, trial=0.01)
    gate.open("v2", hold_outside=True)
    gate.close("swap", "rollouts")
    with pytest.raises(Unavailable):
        await gate.enter("outside")


async def test_a_shut_gate_refuses_those_that_wait_with_its_reason() -> None:
    gate = make_gate()
    gate.open("v1")
    gate.close("swap")
    waiting = asyncio.create_task(gate.enter("outside"))
    await asyncio.sleep(0)
    gate.shut("vLLM ended")
    with pytest.raises(Unavailable, match="vLLM ended"):
        await waiting


async def test_drain_waits_for_the_last_ticket_and_says_when_it_took_too_long() -> None:
    gate = make_gate()
    gate.open("v1")
    ticket = await gate.enter("outside")
    assert not await gate.drain(0.01)
    draining = asyncio.create_task(gate.drain(1.0))
    await asyncio.sleep(0)
    gate.leave(ticket)
    assert await draining
    gate.leave(ticket)


async def test_drain_of_rollouts_does_not_wait_for_outside_requests() -> None:
    gate = make_gate()
    gate.open("v1")
    await gate.enter("outside")
    assert await gate.drain(0.0, "rollouts")


async def test_too_many_requests_are_refused_at_the_door() -> None:
    gate = make_gate(outside=1)
    async with gate.admitted("outside"):
        with pytest.raises(Overloaded, match="which is the limit"):
            async with gate.admitted("outside"):
                pass
    async with gate.admitted("outside"):
        pass
