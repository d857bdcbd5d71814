"""What can be done with a run: which of it makes sense now, and the dialogs that ask before it is done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from enum import StrEnum
from html import escape

from nicegui import ui

from services.contracts.errors import InvalidInput, RatchetError
from services.contracts.runs import IterationsRequest, RollbackRequest, RunStatus, RunView
from services.orchestrator.dashboard.layout import button, html
from services.orchestrator.dashboard.viewer import Viewer
from services.platform.auth import TOKEN_PLACE

MOST_ITERATIONS = 1000
"""As `IterationsRequest` allows."""
STATUS_AFTER = {
    RunStatus.QUEUED: "it waits until the generator is free",
    RunStatus.RUNNING: "it is running",
    RunStatus.IDLE: "all iterations asked for are decided",
}


class Action(StrEnum):
    """A button of the run's page."""

    TRIGGER = "trigger"
    PAUSE = "pause"
    RESUME = "resume"
    ROLLBACK = "rollback"
    CANCEL = "cancel"


AT_WORK = frozenset({RunStatus.RUNNING, RunStatus.QUEUED})
RESUMABLE = frozenset({RunStatus.PAUSED, RunStatus.FAILED, RunStatus.CANCELLED})


def sensible(view: RunView) -> frozenset[Action]:
    """What makes sense to do with a run as it stands."""
    found: set[Action] = set()
    if view.status in AT_WORK | {RunStatus.IDLE, RunStatus.PAUSED}:
        found.add(Action.TRIGGER)
    if view.status in AT_WORK:
        found.add(Action.PAUSE)
    if view.status in RESUMABLE:
        found.add(Action.RESUME)
    if view.status in AT_WORK | {RunStatus.PAUSED}:
        found.add(Action.CANCEL)
    if view.iterations_decided > 0:  # with the baseline alone there is nothing to go back from
        found.add(Action.ROLLBACK)
    return frozenset(found)


class RunActions:
    """The buttons of one run."""

    def __init__(self, viewer: Viewer, view: RunView) -> None:
        self.viewer = viewer
        self.run = view.id
        self.view = view
        self.buttons = {
            Action.TRIGGER: button(
                "Run iterations", "play_arrow", self.trigger, kind="btn btn-first", marker="trigger"
            ),
            Action.PAUSE: button("Pause", "pause", self.pause, marker="pause"),
            Action.RESUME: button("Resume", "replay", self.resume, marker="resume"),
            Action.ROLLBACK: button("Roll back", "undo", self.rollback, marker="rollback"),
            Action.CANCEL: button("Cancel", "stop", self.cancel, kind="btn btn-bad", marker="cancel"),
        }
        self.update(view)

    def update(self, view: RunView) -> None:
        """Enable what makes sense now."""
        self.view = view
        allowed = sensible(view)
        for action, made in self.buttons.items():
            if made.enabled != (action in allowed):
                made.set_enabled(action in allowed)

    def trigger(self) -> None:
        """Ask for how many, then trigger them."""
        with _asking(self.viewer, "Run iterations", "They follow those that were already asked for.") as ask:
            number = ui.number("How many", value=1, min=1, max=MOST_ITERATIONS, step=1, format="%d")
            number.props("outlined dense autofocus").classes("ask-count")

            async def go() -> str:
                count = _whole(number.value, "count", 1, MOST_ITERATIONS)
                view = await self.viewer.dashboard.runs.add_iterations(self.run, IterationsRequest(count=count))
                return (
                    f"{count} more iteration{'s' if count > 1 else ''}: {view.iterations_asked} in all; {_after(view)}."
                )

            ask("Run", go)
            number.on("keydown.enter", ask.submit)

    async def pause(self) -> None:
        """Pause at once: nothing is lost by it."""

        async def go() -> str:
            await self.viewer.dashboard.runs.pause(self.run)
            return "Paused. What runs now, ends; nothing more is started."

        await self._with_token(go)

    async def resume(self) -> None:
        """Go on."""

        async def go() -> str:
            return f"Resumed; {_after(await self.viewer.dashboard.runs.resume(self.run))}."

        await self._with_token(go)

    def rollback(self) -> None:
        """Ask for the iteration and the reason, then set the incumbent back."""
        about = (
            "The next iteration starts from the policy chosen here, and the generator serves it. Nothing is deleted."
        )
        with _asking(self.viewer, "Roll back", about) as ask:
            options = {
                one.iteration: f"iteration {one.iteration}: {one.record.decision}, reward "
                f"{one.record.metrics.proxy_reward or 0.0:.3f}"
                for one in reversed(self.view.iterations)
                if one.record is not None
            }
            chosen = ui.select(options, label="Back to", value=None).props("outlined dense").classes("ask-iteration")
            reason = ui.input("Reason (kept with the run)").props("outlined dense maxlength=500").classes("ask-reason")

            async def go() -> str:
                if chosen.value is None:
                    raise InvalidInput("choose the iteration to go back to", field="to_iteration")
                words = str(reason.value or "").strip()
                if not words:
                    raise InvalidInput("say why, for whoever reads this run later", field="reason")
                request = RollbackRequest(to_iteration=int(chosen.value), reason=words)
                view = await self.viewer.dashboard.runs.rollback(self.run, request)
                return f"Rolled back to iteration {request.to_iteration}; incumbent is {view.incumbent}."

            ask("Roll back", go)

    def cancel(self) -> None:
        """Ask once more, then cancel."""
        about = "What runs is stopped within seconds. What is published stays, and the run can be resumed."
        with _asking(self.viewer, f"Cancel {self.run}?", about) as ask:

            async def go() -> str:
                await self.viewer.dashboard.runs.cancel(self.run)
                return "Cancelled. Resume goes on from what is published."

            ask("Cancel the run", go, bad=True)

    async def _with_token(self, action: Callable[[], Awaitable[str]]) -> None:
        async def attempt() -> None:
            await self.viewer.attempt(action)

        await ask_token(self.viewer, attempt)


class _Ask:
    """Adds the buttons of a dialog. An error keeps it open and is shown in it."""

    def __init__(self, viewer: Viewer, dialog: ui.dialog) -> None:
        self._viewer = viewer
        self._dialog = dialog
        self._action: Callable[[], Awaitable[str]] | None = None

    def __call__(self, text: str, action: Callable[[], Awaitable[str]], *, bad: bool = False) -> None:
        self._action = action
        self._wrong = ui.label().classes("wrong").props("role=alert")
        with ui.element("div").classes("buttons"):
            button("Back", "close", self._dialog.close, marker="back")
            kind = "btn btn-bad btn-first" if bad else "btn btn-first"
            button(text, "check", self.submit, kind=kind, marker="confirm")

    async def submit(self) -> None:
        """Do it; the token is asked for first where it is needed."""
        if self._action is None:
            return
        if not self._viewer.signed_in:
            await ask_token(self._viewer, self.submit)
            return
        try:
            self._viewer.require_control()
            told = await self._action()
        except RatchetError as error:
            self._wrong.text = error.detail
            return
        self._viewer.tell(told)
        self._dialog.close()


@contextmanager
def _dialog(viewer: Viewer, title: str, about: str) -> Generator[ui.dialog]:
    with viewer.client, ui.dialog() as dialog, ui.card().classes("ask").props(f'role=dialog aria-label="{title}"'):
        html(escape(title), tag="h2")
        ui.label(about).classes("quiet")
        yield dialog
    dialog.on("hide", dialog.delete)
    dialog.open()


@contextmanager
def _asking(viewer: Viewer, title: str, about: str) -> Generator[_Ask]:
    with _dialog(viewer, title, about) as dialog:
        yield _Ask(viewer, dialog)


async def ask_token(viewer: Viewer, then: Callable[[], Awaitable[None]] | None) -> None:
    """Ask for the stack's token, then go on; who is signed in goes on at once."""
    if viewer.signed_in:
        if then is not None:
            await then()
        return
    about = f"Reading is open; control needs the token, {TOKEN_PLACE}."
    with _dialog(viewer, "Sign in", about) as dialog:
        token = ui.input("Token").props("outlined dense type=password autocomplete=current-password autofocus")
        token.classes("ask-token")
        wrong = ui.label().classes("wrong").props("role=alert")

        async def submit() -> None:
            try:
                viewer.sign_in(str(token.value or ""))
            except RatchetError as error:
                wrong.text = error.detail
                return
            dialog.close()
            if then is not None:
                await then()

        token.on("keydown.enter", submit)
        with ui.element("div").classes("buttons"):
            button("Back", "close", dialog.close, marker="back")
            button("Sign in", "lock_open", submit, kind="btn btn-first", marker="confirm-token")


def _after(view: RunView) -> str:
    return STATUS_AFTER.get(view.status, f"it is {view.status}")


def _whole(value: float | None, field: str, least: int, most: int) -> int:
    if value is None or value != int(value) or not least <= value <= most:
        raise InvalidInput(f"a whole number from {least} to {most} is needed, not {value}", field=field)
    return int(value)
