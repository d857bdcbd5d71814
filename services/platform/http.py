"""HTTP client of the services and of `ratchet`: deadlines, retries where they can help, problems as exceptions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import stamina
from pydantic import BaseModel, SecretStr, ValidationError

from services.contracts import errors
from services.contracts.problems import Problem
from services.platform.tracing import current_trace

CONNECT_SECONDS = 5.0
"""On loopback or in one cluster a healthy service accepts at once."""
CALL_SECONDS = 30.0
"""Deadline of a call that does not wait for a model."""
RETRY_STATUSES = frozenset({408, 429, 502, 503, 504})
RETRY_ATTEMPTS = 5
RETRY_SECONDS = 45.0
"""After this long without an answer the caller is told rather than kept waiting."""

Body = TypeVar("Body", bound=BaseModel)

ERRORS_BY_CODE = {
    cls.code: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, errors.RatchetError) and cls is not errors.RatchetError
}


class RemoteError(errors.UpstreamFailed):
    """A service answered with a problem that has no class of its own here."""


def error_from(response: httpx.Response) -> errors.RatchetError:
    """The exception a problem answer stands for; same class as the one the service raised, where we have it."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValueError:
        text = response.text[:300].strip()
        problem = Problem(
            title=response.reason_phrase, status=response.status_code, detail=text or response.reason_phrase
        )
    cls = ERRORS_BY_CODE.get(problem.code)
    where = f"{response.request.method} {response.request.url.copy_with(query=None)}"
    after = response.headers.get("retry-after", "")
    retry_after = float(after) if after.isdigit() else None
    if cls is None:
        return RemoteError(f"{where} answered {response.status_code}: {problem.detail}", field=problem.field)
    return cls(problem.detail, field=problem.field, retry_after_seconds=retry_after)


class ServiceClient:
    """Calls one service. Retries only connect errors and 408, 429, 502, 503, 504; a 4xx is told at once.

    A call made within a request or a job carries its ids on (`traceparent`, `X-Request-Id`).

    Args:
        name: Of the service, for error messages.
        retry: False for calls that must not be repeated or whose caller has its own retries (job workers).
    """

    def __init__(self, name: str, base_url: str, token: SecretStr | None = None, *, retry: bool = True,
                 transport: httpx.AsyncBaseTransport | None = None) -> None:  # fmt: skip
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        self.name = name
        self.base_url = base_url
        self._attempts = RETRY_ATTEMPTS if retry else 1
        self.http = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS),
            transport=transport,
            trust_env=False,
        )

    async def call(self, method: str, path: str, *, answer: type[Body], body: BaseModel | None = None,
                   timeout_seconds: float = CALL_SECONDS, params: dict[str, Any] | None = None) -> Body:  # fmt: skip
        """Send a contract, get a contract.

        Raises:
            RatchetError: the service's own problem, or `Unavailable` / `DeadlineExceeded` naming service and deadline.
        """
        response = await self.send(method, path, body=body, timeout_seconds=timeout_seconds, params=params)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise errors.UpstreamFailed(
                f"{self.name} at {self.base_url} answered {method} {path} with something that is no {answer.__name__} "
                f"({'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}); do both run the same version?"
            ) from error

    async def send(self, method: str, path: str, *, body: BaseModel | None = None, content: bytes | None = None,
                   timeout_seconds: float = CALL_SECONDS, params: dict[str, Any] | None = None,
                   headers: dict[str, str] | None = None) -> httpx.Response:  # fmt: skip
        """Like `call`, but gives the raw answer (always below 400)."""
        payload = body.model_dump_json().encode() if body is not None else content
        sent = _with_trace(headers)
        if body is not None:
            sent["Content-Type"] = "application/json"
        timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        async for attempt in stamina.retry_context(
            on=_worth_a_retry, attempts=self._attempts, timeout=RETRY_SECONDS, wait_initial=0.2, wait_max=5.0
        ):
            with attempt:
                try:
                    response = await self.http.request(
                        method, path, content=payload, headers=sent, timeout=timeout, params=params
                    )
                except httpx.HTTPError as error:
                    raise self._transport_error(error, f"{method} {path}", timeout_seconds) from error
                if response.status_code >= 400:
                    raise error_from(response)
                return response
        raise AssertionError("unreachable: stamina either returns or raises")

    @asynccontextmanager
    async def stream(self, method: str, path: str, *, body: BaseModel | None = None, read_seconds: float = CALL_SECONDS,
                     params: dict[str, Any] | None = None,
                     headers: dict[str, str] | None = None) -> AsyncGenerator[httpx.Response]:  # fmt: skip
        """A streamed answer. `read_seconds` bounds the silence between two pieces, not the whole."""
        sent = _with_trace(headers)
        if body is not None:
            sent["Content-Type"] = "application/json"
        timeout = httpx.Timeout(read_seconds, connect=CONNECT_SECONDS)
        payload = body.model_dump_json().encode() if body is not None else None
        try:
            async with self.http.stream(
                method, path, content=payload, headers=sent, timeout=timeout, params=params
            ) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise error_from(response)
                yield response
        except httpx.HTTPError as error:
            raise self._transport_error(error, f"{method} {path}", read_seconds) from error

    def _transport_error(self, error: httpx.HTTPError, what: str, seconds: float) -> errors.RatchetError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return errors.DeadlineExceeded(f"{self.name} at {self.base_url} did not answer {what} within {seconds:g} s")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return errors.Unavailable(f"{self.name} at {self.base_url} cannot be reached for {what}: {_reason(error)}")
        return errors.ConnectionLost(f"{self.name} at {self.base_url} broke off {what}: {_reason(error)}")

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()


def _with_trace(headers: dict[str, str] | None) -> dict[str, str]:
    trace = current_trace()
    return {**(trace.headers() if trace is not None else {}), **(headers or {})}


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _worth_a_retry(error: Exception) -> bool | float:
    if isinstance(error, errors.DeadlineExceeded | errors.ConnectionLost):
        return False  # the deadline is the caller's, and a lost request may have taken effect
    if isinstance(error, errors.RatchetError) and (error.retryable or error.status in RETRY_STATUSES):
        return error.retry_after_seconds or not isinstance(error, errors.SwapFailed | errors.ScoreInvalid)
    return False
