"""What every page has: the bar on top with services, theme and sign-in, and the frame below it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from fastapi import Request
from nicegui import ui

from services.contracts.errors import RatchetError
from services.orchestrator.dashboard import panels
from services.orchestrator.dashboard.mount import ICON
from services.orchestrator.dashboard.viewer import Viewer, asset

Place = Literal["runs", "services"]
THEMES = ("auto", "light", "dark")
THEME_ICONS = {"auto": "brightness_auto", "light": "light_mode", "dark": "dark_mode"}
DARK: dict[str, bool | None] = {"auto": None, "light": False, "dark": True}


@contextmanager
def page(request: Request, title: str, place: Place) -> Generator[Viewer]:
    """A page; what is built inside stands in its main part."""
    viewer = Viewer(request)
    viewer.client.title = f"{title} · Ratchet"
    if viewer.theme not in THEMES:
        viewer.theme = "auto"
    ui.add_head_html(
        f'<link rel="stylesheet" href="{asset("ratchet.css")}"><script src="{asset("ratchet.js")}"></script>'
        f'<script>document.documentElement.dataset.theme = "{viewer.theme}"</script>'
    )
    _bar(viewer, place)
    with ui.element("main").classes("page").props('id=main tabindex=-1 style="outline: none"'):
        banner = html().classes("early")
        banner.visible = False

        def stale(error: RatchetError | None) -> None:
            show(banner, panels.problem(error.problem()) if error else "")
            banner.visible = error is not None

        viewer.stale = stale
        yield viewer


def html(content: str = "", *, tag: str = "div") -> ui.html:
    """HTML of our own templates, in which every value is escaped."""
    return ui.html(content, sanitize=False, tag=tag)


def show(element: ui.html, content: str) -> None:
    """Replace HTML, if it is another."""
    if element.content != content:
        element.content = content


def button(text: str, icon: str, on_click: Callable[[], object], *, kind: str = "btn", marker: str = "") -> ui.button:
    """A button in the page's style."""
    made = ui.button(text, icon=icon, on_click=on_click, color=None).props("flat no-caps no-wrap dense").classes(kind)
    return made.props(f'data-action="{marker}"') if marker else made


def not_found(viewer: Viewer, error: RatchetError) -> None:
    """Say in place of the page's contents what is wrong."""
    viewer.client.status_code = error.status
    html(panels.problem(error.problem()))


def _bar(viewer: Viewer, place: Place) -> None:
    html('<a class="skip" href="#main">Skip to the contents</a>')
    with ui.element("header").classes("top"), ui.element("div").classes("top-in"):
        html(f'<a class="brand" href="/ui/" aria-label="Ratchet: all runs">{ICON.format(colour="currentColor")}'
             "<span>Ratchet</span></a>")  # fmt: skip
        links = "".join(
            f'<a href="{address}"{" aria-current=page" if name == place else ""}>{name.capitalize()}</a>'
            for name, address in (("runs", "/ui/"), ("services", "/ui/services"))
        )
        html(f'<nav class="nav" aria-label="Pages">{links}</nav>')
        ui.element("div").classes("gap")
        health = viewer.dashboard.health
        corner = html(panels.indicator(health.health))
        viewer.watch(health, lambda: show(corner, panels.indicator(health.health)))
        _theme(viewer)
        _sign_in(viewer)


def _theme(viewer: Viewer) -> None:
    dark = ui.dark_mode(DARK[viewer.theme])

    def turn() -> None:
        viewer.theme = THEMES[(THEMES.index(viewer.theme) + 1) % len(THEMES)]
        dark.value = DARK[viewer.theme]
        toggle.props(f"icon={THEME_ICONS[viewer.theme]} {_theme_label(viewer.theme)}")
        ui.run_javascript(f'ratchetTheme("{viewer.theme}")')

    toggle = button("", THEME_ICONS[viewer.theme], turn, kind="btn-plain", marker="theme")
    toggle.props(_theme_label(viewer.theme))


def _theme_label(theme: str) -> str:
    return f'aria-label="Colours: {theme}; change" title="Colours: {theme}"'


def _sign_in(viewer: Viewer) -> None:
    from services.orchestrator.dashboard.actions import ask_token

    def shown() -> None:
        holder.clear()
        with holder:
            if viewer.signed_in:
                made = button("", "logout", viewer.sign_out, kind="btn-plain", marker="sign-out")
                made.props('aria-label="Sign out" title="Signed in; sign out"')
            else:
                made = button("", "lock_open", partial(ask_token, viewer, None), kind="btn-plain", marker="sign-in")
                made.props('aria-label="Sign in to control" title="Sign in to control"')

    holder = ui.element("div")
    shown()
    viewer.on_sign_in(shown)
