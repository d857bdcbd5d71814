"""Who may control through the dashboard."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from services.contracts.errors import Overloaded, Unauthorized
from services.orchestrator.dashboard.browsers import COOKIE, Browsers
from services.orchestrator.dashboard.session import (
    SESSION_SECONDS,
    TICKET_SECONDS,
    WINDOW_SECONDS,
    WRONG_TOKENS,
    WRONG_TOKENS_OF_ALL,
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


def test_a_restart_ends_every_session_so_that_none_that_was_signed_out_comes_back(
    sessions: Sessions, clock: Clock
) -> None:
    signed_out, other = sessions.sign_in(TOKEN, "here"), sessions.sign_in(TOKEN, "there")
    sessions.end(signed_out)
    restarted = Sessions(SecretStr(TOKEN), clock)
    assert not restarted.valid(signed_out)
    assert not restarted.valid(other)
    assert restarted.valid(restarted.sign_in(TOKEN, "here"))


def test_a_session_that_was_signed_out_is_worth_nothing(sessions: Sessions) -> None:
    session, other = sessions.sign_in(TOKEN, "here"), sessions.sign_in(TOKEN, "here")
    sessions.end(session)
    assert not sessions.valid(session)
    assert sessions.valid(other)


def test_wrong_tokens_make_a_browser_wait_and_no_other(sessions: Sessions, clock: Clock) -> None:
    for _ in range(WRONG_TOKENS):
        with pytest.raises(Unauthorized):
            sessions.sign_in("wrong-wrong-wrong", "there")
    with pytest.raises(Overloaded, match="try again in 60 s"):
        sessions.sign_in(TOKEN, "there")
    assert sessions.valid(sessions.sign_in(TOKEN, "elsewhere"))
    clock.now += WINDOW_SECONDS + 1
    assert sessions.valid(sessions.sign_in(TOKEN, "there"))


def test_wrong_tokens_of_ever_new_browsers_are_bounded_too(sessions: Sessions, clock: Clock) -> None:
    for number in range(WRONG_TOKENS_OF_ALL):
        with pytest.raises(Unauthorized):
            sessions.sign_in("wrong-wrong-wrong", f"browser {number}")
    with pytest.raises(Overloaded, match="from all browsers"):
        sessions.sign_in(TOKEN, "yet another")
    clock.now += WINDOW_SECONDS + 1
    assert sessions.valid(sessions.sign_in(TOKEN, "yet another"))


def test_a_ticket_is_good_once_and_not_for_long(sessions: Sessions, clock: Clock) -> None:
    session = sessions.sign_in(TOKEN, "here")
    ticket = sessions.ticket(session, "here")
    assert sessions.redeem(ticket, "here") == session
    with pytest.raises(Unauthorized):
        sessions.redeem(ticket, "here")
    late = sessions.ticket(session, "here")
    clock.now += TICKET_SECONDS + 1
    with pytest.raises(Unauthorized):
        sessions.redeem(late, "here")


@pytest.mark.parametrize("other", ["there", None])
def test_a_ticket_is_worth_nothing_to_another_browser(sessions: Sessions, other: str | None) -> None:
    ticket = sessions.ticket(sessions.sign_in(TOKEN, "here"), "here")
    with pytest.raises(Unauthorized, match="another browser"):
        sessions.redeem(ticket, other)


def test_a_browser_is_who_we_named_also_after_a_restart_and_nobody_else() -> None:
    browsers = Browsers(SecretStr(TOKEN))
    cookie = browsers.new()
    name = browsers.of({COOKIE: cookie})
    assert name is not None
    assert Browsers(SecretStr(TOKEN)).of({COOKIE: cookie}) == name
    assert Browsers(SecretStr("a-new-token-of-this-stack")).of({COOKIE: cookie}) is None
    assert browsers.of({COOKIE: browsers.new()}) != name
    for forged in ("", ".", name, f"{name}.0", f"other.{cookie.rpartition('.')[2]}", "\u00fc.\u00fc"):
        assert browsers.of({COOKIE: forged}) is None
    assert browsers.of({}) is None
