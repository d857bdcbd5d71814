"""Pairs in a real browser: found, sorted, read one after the other, linked to."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.fixtures.dashboard import DashboardServer
from tests.fixtures.dashboard_store import seed_pairs, seed_run

COUNT = 120
ADDRESS = "/ui/runs/r/pairs?iteration=2"
expect.set_options(timeout=15_000)


@pytest.fixture
def pairs(server: DashboardServer, open_page: Open) -> Page:
    seed_pairs(server.stack.store, seed_run(server.stack.store, "r", 2), 2, COUNT)
    page = open_page(ADDRESS).page
    expect(page.locator("[data-part=found]")).to_have_text("1 – 50 of 120 pairs")  # noqa: RUF001
    return page


def shown(page: Page, number: int) -> None:
    expect(page.locator("article.pair")).to_have_attribute("data-number", str(number))


def test_a_pair_is_found_by_its_text_and_read_among_all_its_responses(pairs: Page) -> None:
    pairs.get_by_label("Search prompt, chosen and rejected").fill("(QUESTION 99)")
    expect(pairs.locator("[data-part=found]")).to_have_text("1 – 1 of 1 pairs")  # noqa: RUF001
    shown(pairs, 99)
    expect(pairs.locator(".turn")).to_have_count(3)
    expect(pairs.locator(".turn").last).to_contain_text("(question 99)")
    expect(pairs.locator(".response")).to_have_count(4)
    expect(pairs.locator(".response").nth(0)).to_contain_text("chosen")
    expect(pairs.locator(".response").nth(1)).to_contain_text("rejected")
    rewards = [float(text) for text in pairs.locator(".response .reward").all_inner_texts()]
    assert rewards[0] == max(rewards)
    assert rewards[1] == min(rewards)
    pairs.get_by_label("Search prompt, chosen and rejected").fill("no pair says this")
    expect(pairs.get_by_text("No pair matches")).to_be_visible()


def test_keys_and_buttons_lead_to_the_next_and_the_previous_pair(pairs: Page) -> None:
    shown(pairs, 0)
    pairs.keyboard.press("j")
    shown(pairs, 1)
    pairs.keyboard.press("ArrowRight")
    shown(pairs, 2)
    pairs.keyboard.press("k")
    shown(pairs, 1)
    pairs.get_by_role("button", name="Next").last.click()
    shown(pairs, 2)
    pairs.keyboard.press("ArrowLeft")
    shown(pairs, 1)
    expect(pairs.locator(".picked")).to_have_attribute("data-number", "1")
    for _ in range(55):
        pairs.keyboard.press("j")
    shown(pairs, 56)
    expect(pairs.locator("[data-part=found]")).to_have_text("51 – 100 of 120 pairs")  # noqa: RUF001
    pairs.keyboard.press("/")
    search = pairs.get_by_label("Search prompt, chosen and rejected")
    expect(search).to_be_focused()
    search.fill("jjkk")  # letters typed in a field are text, not steps
    expect(pairs.get_by_text("No pair matches")).to_be_visible()


def test_pairs_are_sorted_and_limited_by_their_margin(pairs: Page) -> None:
    pairs.get_by_label("Sort by").click()
    pairs.get_by_role("option", name="margin").click()
    pairs.get_by_role("checkbox", name="largest first").click()
    expect(pairs).to_have_url(re.compile("sort=margin&descending=True"))
    margins = [float(text) for text in pairs.locator(".pair-list tbody tr td:nth-child(3)").all_inner_texts()]
    assert margins == sorted(margins, reverse=True)
    assert len(margins) == 50
    pairs.get_by_label("Margin to").fill(str(margins[9]))
    expect(pairs.locator("[data-part=found]")).not_to_contain_text("120")
    pairs.get_by_label("Margin from").fill("100")
    expect(pairs.get_by_role("alert")).to_contain_text("is above max_margin")


def test_the_address_leads_back_to_the_same_pair_in_the_same_list(pairs: Page, open_page: Open) -> None:
    pairs.get_by_label("Sort by").click()
    pairs.get_by_role("option", name="chosen reward").click()
    pairs.locator(".pair-list tbody tr").nth(7).click()
    expect(pairs).to_have_url(re.compile("at=7"))
    number = int(re.search(r"number=(\d+)", pairs.url)[1])  # type: ignore[index]
    shown(pairs, number)
    again = open_page(pairs.url[pairs.url.index("/ui/") :]).page
    shown(again, number)
    expect(again.locator(".picked")).to_have_attribute("data-number", str(number))
    expect(again.get_by_text("8 of 120 found")).to_be_visible()
    plain = open_page(f"{ADDRESS}&number=77").page
    shown(plain, 77)
    expect(plain.locator("[data-part=found]")).to_have_text("51 – 100 of 120 pairs")  # noqa: RUF001
