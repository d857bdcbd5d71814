"""The OpenAI routes, passed through to vLLM: one policy per answer, and no request lost to a swap."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import TypeVar

import httpx
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.contracts.errors import RatchetError, TooLarge, Unavailable
from services.contracts.problems import PROBLEM_MEDIA_TYPE
from services.generator import metrics
from services.generator.engine_client import transport_error
from services.generator.gate import RETRY_SECONDS, Ticket
from services.generator.policy import PolicyServer

VERSION_HEADER = b"x-policy-version"
MAX_BODY_BYTES = 16 << 20
"""A longer prompt fits no context."""
PASSED_ON = ("content-type", "accept")
RETURNED = (b"content-type", b"retry-after")
EVENT_STREAM = "text/event-stream"

Result = TypeVar("Result")


class Interrupted(Exception):
    """A swap asked this request to stop."""


def openai_error(error: RatchetError, instance: str | None = None) -> JSONResponse:
    """An error of ours in both shapes at once: RFC 9457, with OpenAI's `error` object as an extension member."""
    body = error.problem(instance).model_dump(exclude_none=True, mode="json") | {"error": _error_object(error)}
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    return JSONResponse(body, status_code=error.status, media_type=PROBLEM_MEDIA_TYPE, headers=headers)


async def pass_through(request: Request, policy: PolicyServer) -> Response:
    """The answer to an OpenAI request: vLLM's, streamed when vLLM streams, with `X-Policy-Version`."""
    request_id = getattr(request.state, "request_id", None)
    try:
        body = await _body(request)
    except TooLarge as error:
        return openai_error(error, request_id)
    return PassThrough(request, body, policy, request_id)


async def _body(request: Request) -> bytes:
    """The body, refused as soon as it is too large: this route needs no token, and memory is not the caller's."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(
                f"the body is larger than {MAX_BODY_BYTES:,} bytes; no context holds such a prompt", field="body"
            )
    return bytes(body)


class PassThrough(Response):
    """Sends the request to vLLM and its answer to the caller.

    It waits at the gate while a swap or a trial is under way. A swap takes back a request that has sent nothing to its
    caller yet, and it is sent again to the new policy; a stream that has begun cannot be, so it finishes with the old
    policy, or ends with an error event when that takes too long. Either way an answer comes from one version.
    """

    def __init__(self, request: Request, body: bytes, policy: PolicyServer, request_id: str | None) -> None:
        super().__init__()
        self._path = request.url.path
        self._headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        self._body = body
        self._policy = policy
        self._request_id = request_id
        self._streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. A caller that goes away ends the request, in vLLM too."""
        gone = asyncio.create_task(_disconnected(receive))
        try:
            async with self._policy.gate.admitted("outside"):
                while not await self._attempt(send, gone):
                    metrics.RESENT.inc()
        except ClientDisconnect:
            return
        except RatchetError as error:
            if self._streaming:
                await _send_last_event(send, error)
            else:
                await openai_error(error, self._request_id)(scope, receive, send)
        finally:
            gone.cancel()

    async def _attempt(self, send: Send, gone: asyncio.Task[None]) -> bool:
        """One passage of the gate. False when a swap took the request back."""
        ticket = await _race(self._policy.gate.enter("outside"), gone)
        metrics.IN_FLIGHT.labels("outside").inc()
        try:
            await _race(self._forward(ticket, send), gone, ticket)
        except Interrupted:
            if not ticket.committed:
                return False
            raise Unavailable(
                f"the policy {ticket.version} was swapped out before this stream ended; send the request again",
                retry_after_seconds=RETRY_SECONDS,
            ) from None
        finally:
            metrics.IN_FLIGHT.labels("outside").dec()
            self._policy.gate.leave(ticket)
        return True

    async def _forward(self, ticket: Ticket, send: Send) -> None:
        engine = self._policy.engine
        if engine is None:
            raise Unavailable("vLLM has ended; it is being restarted", retry_after_seconds=RETRY_SECONDS)
        engine.client.check_open(self._path)
        http = engine.client.generation
        try:
            request = http.build_request("POST", self._path, content=self._body, headers=self._headers)
            answer = await http.send(request, stream=True)
            try:
                if answer.headers.get("content-type", "").startswith(EVENT_STREAM):
                    async for chunk in answer.aiter_raw():
                        if not ticket.committed:
                            self._streaming = ticket.committed = True
                            await self._start(send, answer, ticket)
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    await send({"type": "http.response.body", "body": b""})
                    return
                whole = await answer.aread()
                ticket.committed = True
                await self._start(send, answer, ticket, len(whole))
                await send({"type": "http.response.body", "body": whole})
            finally:
                await answer.aclose()
        except httpx.HTTPError as error:
            seconds = http.timeout.read or 0.0
            lost = transport_error(error, self._path, seconds)
            lost.retry_after_seconds = RETRY_SECONDS
            raise lost from error

    @staticmethod
    async def _start(send: Send, answer: httpx.Response, ticket: Ticket, length: int | None = None) -> None:
        headers = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() in RETURNED]
        headers.append((VERSION_HEADER, ticket.version.encode("latin-1")))
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})


async def _race(work: Coroutine[None, None, Result], gone: asyncio.Task[None], ticket: Ticket | None = None) -> Result:
    """The work's result, unless the caller goes away (ClientDisconnect) or a swap interrupts (Interrupted)."""
    task = asyncio.ensure_future(work)
    stop = asyncio.create_task(ticket.interrupted.wait()) if ticket else None
    try:
        await asyncio.wait({task, gone, *({stop} if stop else ())}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise Interrupted
    finally:
        if stop:
            stop.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_last_event(send: Send, error: RatchetError) -> None:
    event = f"\n\ndata: {json.dumps({'error': _error_object(error)})}\n\n"
    await send({"type": "http.response.body", "body": event.encode()})


def _error_object(error: RatchetError) -> dict[str, str | int | None]:
    return {"message": error.detail, "type": error.code, "param": error.field, "code": error.status}
