"""How the dashboard is mounted: beside the API, any number of times in a process, or not at all."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from services.orchestrator.app import create_app
from services.orchestrator.dashboard.browsers import COOKIE
from services.orchestrator.settings import OrchestratorSettings

TOKEN = "the-token-of-this-stack"


def orchestrator(root: Path, *, dashboard: bool = True) -> FastAPI:
    settings = OrchestratorSettings(token=SecretStr(TOKEN), store_url=str(root / "store"), dashboard=dashboard)
    return create_app(settings)


def client(app: FastAPI, scheme: str = "http") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=f"{scheme}://test")


async def test_without_the_setting_there_is_no_dashboard(tmp_path: Path) -> None:
    async with client(orchestrator(tmp_path, dashboard=False)) as http:
        for path in ("/", "/ui/"):
            answer = await http.get(path)
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/problem+json"


async def test_the_root_leads_to_the_dashboard(tmp_path: Path) -> None:
    async with client(orchestrator(tmp_path)) as http:
        assert (await http.get("/")).headers["location"] == "/ui/"
        assert (await http.get("/v1/absent")).headers["content-type"] == "application/problem+json"


async def test_two_orchestrators_of_one_process_keep_their_sessions_apart(tmp_path: Path) -> None:
    one, other = orchestrator(tmp_path / "one"), orchestrator(tmp_path / "other")
    sessions = one.state.dashboard.sessions
    cookie = one.state.dashboard.browsers.new()
    browser = one.state.dashboard.browsers.of({COOKIE: cookie})
    ticket = sessions.ticket(sessions.sign_in(TOKEN, browser), browser)
    async with client(other) as http:
        http.cookies.set(COOKIE, cookie)
        assert (await http.post("/ui/session", json={"ticket": ticket})).status_code == 401
    async with client(one) as http:
        http.cookies.set(COOKIE, cookie)
        assert (await http.post("/ui/session", json={"ticket": ticket})).status_code == 200


@pytest.mark.parametrize(("scheme", "secure"), [("http", False), ("https", True)])
async def test_the_session_s_cookie_is_out_of_reach_of_scripts_and_other_sites(
    tmp_path: Path, scheme: str, secure: bool
) -> None:
    app = orchestrator(tmp_path)
    sessions = app.state.dashboard.sessions
    async with client(app, scheme) as http:
        page = await http.get("/ui/absent")
        assert page.headers["set-cookie"].startswith("ratchet_browser=")
        assert all(part in page.headers["set-cookie"] for part in ("HttpOnly", "SameSite=lax", "Path=/ui"))
        assert ("Secure" in page.headers["set-cookie"]) is secure
        assert "set-cookie" not in (await http.get("/ui/absent")).headers
        browser = app.state.dashboard.browsers.of(http.cookies)
        session = sessions.sign_in(TOKEN, browser)
        ticket = sessions.ticket(session, browser)
        answer = await http.post("/ui/session", json={"ticket": ticket})
        cookie = answer.headers["set-cookie"]
        assert all(part in cookie for part in ("HttpOnly", "SameSite=lax", "Path=/ui"))
        assert ("Secure" in cookie) is secure
        assert TOKEN not in cookie
        await http.delete("/ui/session")
    assert not sessions.valid(session)


async def test_our_assets_are_kept_by_the_browser_under_their_version(tmp_path: Path) -> None:
    async with client(orchestrator(tmp_path)) as http:
        answer = await http.get("/ui/assets/ratchet.css?v=1")
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
        absent = await http.get("/ui/assets/absent.css")
        assert absent.status_code == 404
        assert "cache-control" not in absent.headers
