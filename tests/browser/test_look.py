"""How it looks and feels: light and dark, laptop and phone, keyboard, and the services."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.fixtures.dashboard import DashboardServer
from tests.fixtures.dashboard_store import seed_pairs, seed_run

PATHS = ("/ui/", "/ui/runs/r", "/ui/runs/r/pairs?iteration=2", "/ui/services")
PHONE = {"width": 390, "height": 844}
expect.set_options(timeout=15_000)


@pytest.fixture
def seeded(server: DashboardServer) -> DashboardServer:
    seed_pairs(server.stack.store, seed_run(server.stack.store, "r", 6), 2, 20)
    return server


def background(page: Page) -> int:
    """Lightness of the page's background, 0 to 255."""
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) // 3


def wait_for_background(page: Page, holds: Callable[[int], bool], what: str) -> None:
    page.wait_for_function(
        """(dark) => {
          const parts = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number);
          return (parts.reduce((a, b) => a + b) / 3 < 128) === dark;
        }""",
        arg=what == "dark",
    )
    assert holds(background(page))


def test_no_page_scrolls_sideways_on_a_phone(seeded: DashboardServer, open_page: Open) -> None:
    page = open_page("/ui/services").page
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for path in PATHS:
        page.goto(seeded.url + path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        if path == "/ui/runs/r":
            expect(page.locator("[data-curve=reward] canvas")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path


@pytest.mark.parametrize("width", [PHONE["width"], 1024])
def test_the_tiles_fill_their_rows_whatever_their_number(seeded: DashboardServer, open_page: Open, width: int) -> None:
    page = open_page("/ui/runs/r").page
    page.set_viewport_size({"width": width, "height": 844})
    expect(page.locator(".tile")).to_have_count(7)
    for number in (7, 6, 5):
        gaps: list[float] = page.evaluate(
            """() => {
              const right = document.querySelector(".tiles").getBoundingClientRect().right;
              const last = new Map();
              for (const tile of document.querySelectorAll(".tile")) {
                const place = tile.getBoundingClientRect();
                last.set(Math.round(place.top), place.right);
              }
              return [...last.values()].map((edge) => right - edge);
            }"""
        )
        assert max(gaps) <= 2, (number, gaps)
        page.evaluate("document.querySelector('.tile').remove()")


def test_colours_follow_the_system_and_the_toggle_stays_over_a_reload(seeded: DashboardServer, open_page: Open) -> None:
    page = open_page("/ui/runs/r").page
    wait_for_background(page, lambda light: light > 200, "light")
    page.emulate_media(color_scheme="dark")
    wait_for_background(page, lambda light: light < 60, "dark")
    toggle = page.locator('[data-action="theme"]')
    toggle.click()  # light, whatever the system says
    wait_for_background(page, lambda light: light > 200, "light")
    page.reload()
    wait_for_background(page, lambda light: light > 200, "light")
    expect(toggle).to_have_attribute("title", "Colours: light")
    toggle.click()
    wait_for_background(page, lambda light: light < 60, "dark")


def test_the_keyboard_reaches_the_contents_and_shows_where_it_is(seeded: DashboardServer, open_page: Open) -> None:
    page = open_page("/ui/").page
    expect(page.get_by_role("link", name="r", exact=True)).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the contents")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    for _ in range(8):
        if page.evaluate("document.activeElement.classList.contains('run-link')"):
            break
        page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/ui/runs/r$"))


def test_each_service_says_how_it_is_and_the_bar_warns_on_every_page(seeded: DashboardServer, open_page: Open) -> None:
    page = open_page("/ui/services").page
    for name in ("orchestrator", "generator", "reward", "redis", "store"):
        expect(page.locator(f'[data-service="{name}"]')).to_be_visible()
    expect(page.locator('[data-service="redis"]')).to_have_attribute("data-state", "ready")
    expect(page.locator('[data-service="generator"]')).to_have_attribute("data-state", "not_ready")
    expect(page.locator(".indicator")).to_contain_text("generator not ready")
    seeded.call(seeded.stack.start("fresh", iterations=0))
    expect(page.locator('[data-service="generator"]')).to_have_attribute("data-state", "ready")
    expect(page.locator('[data-service="generator"]')).to_contain_text("models/sft")
    expect(page.locator(".indicator")).to_contain_text("models/sft")


def test_the_dashboard_shadows_no_route_of_the_api(server: DashboardServer) -> None:
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/").headers["location"] == "/ui/"
        assert http.get("/v1/runs").json() == []
        absent = http.get("/v1/absent")
        assert absent.status_code == 404
        assert absent.headers["content-type"] == "application/problem+json"
        assert http.get("/docs").status_code == 200
        assert "/ui" not in "".join(http.get("/openapi.json").json()["paths"])
        assert http.get("/health/ready").status_code == 200
        http.get("/ui/runs/absent")
        routes = re.findall(r'route="([^"]+)"', http.get("/metrics").text)
    assert "/ui" in routes
    assert not [route for route in routes if "nicegui" in route]


def test_another_site_cannot_open_the_pages_connection_nor_frame_it(server: DashboardServer) -> None:
    address = "/ui/_nicegui_ws/socket.io/?EIO=4&transport=polling"
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/ui/").status_code == 200  # which gives this browser its name
        assert http.get(address, headers={"Origin": "https://elsewhere.example"}).status_code == 400
        own = http.get(address, headers={"Origin": f"http://{urlsplit(server.url).netloc}"})
        assert own.status_code == 200
        policy = http.get("/ui/").headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'self'" in policy
        refused = http.post("/ui/session", json={"ticket": "made-up"})
        assert refused.status_code == 401
        assert "set-cookie" not in refused.headers
