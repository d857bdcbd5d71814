"""Who may control through the dashboard."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from services.contracts.errors import Overloaded, Unauthorized
from services.orchestrator.dashboard.session import (
    SESSION_SECONDS,
    TICKET_SECONDS,
    WINDOW_SECONDS,
    WRONG_TOKENS,
    Sessions,
    Throttle,
)

TOKEN = "the-token-of-this-stack"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    made = Sessions(SecretStr(TOKEN), clock)
    made.throttle = Throttle(clock)
    return made


def test_the_right_token_makes_a_session_and_another_none(sessions: Sessions) -> None:
    assert sessions.valid(sessions.sign_in(TOKEN, "here"))
    with pytest.raises(Unauthorized, match="not the stack's token"):
        sessions.sign_in("the-token-of-another", "here")


@pytest.mark.parametrize("forged", [None, "", ".", "x", "a.99999999999.0", "a.nan.b", "ü.9.ü"])
def test_what_we_did_not_sign_is_no_session(sessions: Sessions, forged: str | None) -> None:
    assert not sessions.valid(forged)


def test_a_session_cannot_be_made_longer(sessions: Sessions) -> None:
    name, until, signature = sessions.sign_in(TOKEN, "here").split(".")
    assert not sessions.valid(f"{name}.{int(until) + 1}.{signature}")


def test_a_session_ends_after_its_time(sessions: Sessions, clock: Clock) -> None:
    session = sessions.sign_in(TOKEN, "here")
    clock.now += SESSION_SECONDS - 1
    assert sessions.valid(session)
    clock.now += 2
    assert not sessions.valid(session)


def test_a_session_outlives_a_restart_and_not_a_change_of_the_token(sessions: Sessions, clock: Clock) -> None:
    session = sessions.sign_in(TOKEN, "here")
    assert Sessions(SecretStr(TOKEN), clock).valid(session)
    assert not Sessions(SecretStr("a-new-token-of-this-stack"), clock).valid(session)


def test_a_session_that_was_signed_out_is_worth_nothing(sessions: Sessions) -> None:
    session, other = sessions.sign_in(TOKEN, "here"), sessions.sign_in(TOKEN, "here")
    sessions.end(session)
    assert not sessions.valid(session)
    assert sessions.valid(other)


def test_wrong_tokens_make_an_address_wait_and_no_other(sessions: Sessions, clock: Clock) -> None:
    for _ in range(WRONG_TOKENS):
        with pytest.raises(Unauthorized):
            sessions.sign_in("wrong-wrong-wrong", "there")
    with pytest.raises(Overloaded, match="try again in 60 s"):
        sessions.sign_in(TOKEN, "there")
    assert sessions.valid(sessions.sign_in(TOKEN, "elsewhere"))
    clock.now += WINDOW_SECONDS + 1
    assert sessions.valid(sessions.sign_in(TOKEN, "there"))


def test_a_ticket_is_good_once_and_not_for_long(sessions: Sessions, clock: Clock) -> None:
    session = sessions.sign_in(TOKEN, "here")
    ticket = sessions.ticket(session)
    assert sessions.redeem(ticket) == session
    with pytest.raises(Unauthorized):
        sessions.redeem(ticket)
    late = sessions.ticket(session)
    clock.now += TICKET_SECONDS + 1
    with pytest.raises(Unauthorized):
        sessions.redeem(late)
