"""Runs in a real browser: they appear, grow, fail and are controlled, without a reload."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from ratchet.local.redis_server import RedisServer
from services.contracts.errors import JobFailed
from tests.browser.conftest import Open
from tests.fixtures.dashboard import DashboardServer
from tests.fixtures.dashboard_store import seed_run
from tests.fixtures.orchestrator_stack import TOKEN

SECONDS = 1000
expect.set_options(timeout=15 * SECONDS)


POINTS = """([curve, name]) => {
  const root = document.querySelector(`[data-curve="${curve}"] .chart`);
  const shown = (root && getElement(Number(root.id.slice(1)))?.chart?.getOption().series) || [];
  const series = shown.find((one) => one.name === name);
  return series ? series.data.filter((item) => item !== null).length : 0;
}"""
"""Data points of a chart's series, as the chart itself has them."""


def points(page: Page, curve: str, name: str) -> int:
    return page.evaluate(POINTS, [curve, name])


def wait_for_points(page: Page, curve: str, name: str, count: int) -> None:
    page.wait_for_function(f"([curve, name, count]) => ({POINTS})([curve, name]) >= count", arg=[curve, name, count])


def act(page: Page, action: str) -> None:
    page.locator(f'[data-action="{action}"]').click()


def sign_in(page: Page, token: str = TOKEN) -> None:
    """Fill the dialog that asks for the token."""
    page.locator(".ask-token input").fill(token)
    act(page, "confirm-token")


def status(page: Page, name: str) -> None:
    expect(page.locator("[data-status]")).to_have_attribute("data-status", name)


def mark(page: Page) -> None:
    """Leave something in the page that a reload would lose."""
    page.evaluate("window.notReloaded = true")


def assert_not_reloaded(page: Page) -> None:
    assert page.evaluate("window.notReloaded === true")


def test_a_run_started_by_the_api_appears_and_progresses_without_a_reload(
    server: DashboardServer, open_page: Open
) -> None:
    page = open_page("/ui/").page
    expect(page.get_by_text("No run yet")).to_be_visible()
    mark(page)
    server.call(server.stack.start("first"))
    row = page.get_by_role("row").filter(has_text="first")
    expect(row).to_be_visible()
    expect(row).to_contain_text("2 of 2")
    expect(row).to_contain_text("idle")
    expect(row).to_contain_text("first/iter-2")
    expect(page.get_by_text("No run yet")).to_be_hidden()
    assert_not_reloaded(page)
    row.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("first")


def test_the_curves_grow_and_the_stages_move_while_the_run_goes_on(server: DashboardServer, open_page: Open) -> None:
    server.call(server.stack.start("r", iterations=0))
    server.call(server.stack.status("idle"))
    page = open_page("/ui/runs/r").page
    wait_for_points(page, "reward", "candidate", 1)
    assert points(page, "dpo_loss", "loss") == 0
    mark(page)
    server.hold()
    server.call(server.stack.post("/v1/runs/r/iterations", json={"count": 2}))
    status(page, "running")
    expect(page.locator('[data-stage="sample"]')).to_have_attribute("data-state", "running")
    expect(page.locator('[data-stage="prompts"]')).to_have_attribute("data-state", "succeeded")
    server.do(server.trainer.enough.clear)
    server.go_on()
    wait_for_points(page, "training", "loss", 5)
    expect(page.locator('[data-stage="train"]')).to_have_attribute("data-state", "running")
    expect(page.locator('[data-stage="train"] .detail')).to_contain_text("accuracy 0.")
    server.do(server.trainer.enough.set)
    wait_for_points(page, "reward", "candidate", 3)
    wait_for_points(page, "dpo_loss", "loss", 2)
    status(page, "idle")
    expect(page.locator('.decisions [data-decision="promoted"]')).to_have_count(2)
    expect(page.locator('.decisions [data-iteration="2"] .reasons')).to_contain_text("one-sided p =")
    assert_not_reloaded(page)


def test_a_failed_run_shows_its_cause_in_full_and_resumes(server: DashboardServer, open_page: Open) -> None:
    server.stack.trainer.fail = 1
    server.call(server.stack.start("r", iterations=1))
    page = open_page("/ui/runs/r").page
    status(page, "failed")
    alert = page.get_by_role("alert").filter(has_text="the loss is NaN at step 3")
    expect(alert).to_contain_text(JobFailed.title)
    expect(page.locator('[data-stage="train"]')).to_have_attribute("data-state", "failed")
    act(page, "resume")
    sign_in(page)
    status(page, "idle")
    expect(alert).to_have_count(0)


def test_a_wrong_token_is_refused_and_the_right_one_is_asked_for_once(server: DashboardServer, open_page: Open) -> None:
    server.call(server.stack.start("r", iterations=0))
    server.call(server.stack.status("idle"))
    page = open_page("/ui/runs/r").page
    act(page, "trigger")
    page.locator(".ask-count input").fill("2")
    act(page, "confirm")
    sign_in(page, "not-the-token-of-this-stack")
    expect(page.locator(".ask .wrong").filter(has_text="not the stack's token")).to_be_visible()
    assert server.call(server.stack.view()).iterations_asked == 0
    with page.expect_response(re.compile("/ui/session$")) as answer:
        sign_in(page)
    assert answer.value.status == 200
    expect(page.locator("[data-status]")).to_contain_text("2 of 2 iterations decided")
    cookie = next(one for one in page.context.cookies() if one.get("name") == "ratchet_session")
    assert cookie.get("httpOnly") is True
    assert cookie.get("sameSite") == "Lax"
    page.reload()
    act(page, "trigger")
    act(page, "confirm")
    expect(page.locator("[data-status]")).to_contain_text("3 of 3 iterations decided")
    page.locator('[data-action="sign-out"]').click()
    expect(page.locator('[data-action="sign-in"]')).to_be_visible()


def test_who_signs_out_elsewhere_controls_nothing_any_more(server: DashboardServer, open_page: Open) -> None:
    server.call(server.stack.start("r", iterations=0))
    server.call(server.stack.status("idle"))
    page = open_page("/ui/runs/r").page
    act(page, "sign-in")
    with page.expect_response(re.compile("/ui/session$")):
        sign_in(page)
    other = page.context.new_page()
    other.goto(server.url + "/ui/")
    other.locator('[data-action="sign-out"]').click()
    expect(other.locator('[data-action="sign-in"]')).to_be_visible()
    page.bring_to_front()
    act(page, "trigger")  # the page was signed in when it was made, and still shows itself so
    act(page, "confirm")
    expect(page.locator(".ask-token")).to_be_visible()
    assert server.call(server.stack.view()).iterations_asked == 0


def test_a_run_is_paused_resumed_and_cancelled_by_its_buttons(server: DashboardServer, open_page: Open) -> None:
    server.call(server.stack.start("r", iterations=0))
    server.call(server.stack.status("idle"))
    page = open_page("/ui/runs/r").page
    expect(page.locator('[data-action="pause"]')).to_be_disabled()
    expect(page.locator('[data-action="cancel"]')).to_be_disabled()
    server.hold()
    act(page, "trigger")
    act(page, "confirm")
    sign_in(page)
    status(page, "running")
    act(page, "pause")
    status(page, "paused")
    expect(page.get_by_text("Paused. What runs now, ends")).to_be_visible()
    expect(page.locator('[data-action="pause"]')).to_be_disabled()
    act(page, "resume")
    status(page, "running")
    act(page, "cancel")
    expect(page.get_by_role("heading", name="Cancel r?")).to_be_visible()
    act(page, "back")
    expect(page.get_by_role("heading", name="Cancel r?")).to_be_hidden()
    assert server.call(server.stack.view()).status == "running"
    act(page, "cancel")
    act(page, "confirm")
    status(page, "cancelled")
    server.go_on()


def test_a_rollback_asks_for_iteration_and_reason_and_sets_the_incumbent_back(
    server: DashboardServer, open_page: Open
) -> None:
    server.call(server.stack.start("r"))
    server.call(server.stack.status("idle"))
    page = open_page("/ui/runs/r").page
    expect(page.locator("[data-status]")).to_contain_text("incumbent r/iter-2")
    promoted = page.locator(".tile").filter(has_text="Promoted")
    expect(promoted).to_contain_text("incumbent r/iter-2")
    act(page, "rollback")
    act(page, "confirm")
    sign_in(page)
    wrong = page.get_by_role("dialog", name="Roll back").get_by_role("alert")
    expect(wrong).to_have_text("choose the iteration to go back to")
    page.locator(".ask-iteration").click()
    page.get_by_role("option", name=re.compile("iteration 1")).click()
    act(page, "confirm")
    expect(wrong).to_have_text("say why, for whoever reads this run later")
    page.locator(".ask-reason input").fill("answers became too long")
    act(page, "confirm")
    expect(page.locator("[data-status]")).to_contain_text("incumbent r/iter-1")
    expect(promoted).to_contain_text("incumbent r/iter-1")
    expect(page.get_by_text("r/iter-2")).to_have_count(0)
    control = server.stack.app.state.runs.runbook.control("r")
    assert [(one.to_iteration, one.reason) for one in control.rollbacks] == [(1, "answers became too long")]


@pytest.mark.parametrize("path", ["/ui/runs/absent", "/ui/runs/absent/pairs"])
def test_an_unknown_run_is_said_to_be_unknown(open_page: Open, path: str) -> None:
    watched = open_page(path)
    expect(watched.page.get_by_role("alert")).to_contain_text("there is no run 'absent'")
    assert watched.errors.pop().startswith("error: Failed to load resource: the server responded with a status of 404")


def test_a_page_recovers_by_itself_when_the_orchestrator_comes_back(
    tmp_path: Path, redis_server: RedisServer, port: int, context: BrowserContext
) -> None:
    redis_server.start()
    page = context.new_page()
    with DashboardServer(tmp_path, redis_server.url, port=port) as first:
        seed_run(first.stack.store, "before", 1)
        page.goto(first.url + "/ui/")
        expect(page.get_by_role("link", name="before")).to_be_visible()
    expect(page.get_by_text("Connection lost")).to_be_visible()
    with DashboardServer(tmp_path, redis_server.url, port=port) as second:
        seed_run(second.stack.store, "while-away", 1)
        expect(page.get_by_role("link", name="while-away")).to_be_visible(timeout=30 * SECONDS)
        expect(page.get_by_text("Connection lost")).to_be_hidden()
        page.close()
