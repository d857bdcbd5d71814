"""HTTP to vLLM. Control and generation have separate connection pools, so control never queues behind generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict

from services.contracts.checkpoints import LogprobProbe
from services.contracts.errors import DeadlineExceeded, RatchetError, Unavailable, UpstreamFailed
from services.contracts.rollouts import SamplingGroup
from services.generator.probes import Logprobs
from services.generator.settings import GeneratorSettings

CONNECT_SECONDS = 5.0


class EngineDescription(BaseModel):
    """What the running engine says of itself."""

    model_config = ConfigDict(frozen=True)

    dtype: str
    max_model_len: int
    sleep_mode: bool = False
    """Whether sleeping frees the memory; vLLM on CPU only pauses."""


class EngineRejected(UpstreamFailed):
    """vLLM answered a generation with an error of the request's making (its status is below 500)."""

    def __init__(self, message: str, parameter: str | None) -> None:
        super().__init__(message)
        self.parameter = parameter


class EngineClient:
    """vLLM's routes as methods."""

    def __init__(self, base_url: str, settings: GeneratorSettings, transport: httpx.AsyncBaseTransport | None = None):
        self.base_url = base_url
        self._settings = settings
        self._model = settings.generator_model_name
        seconds = settings.generator_response_seconds
        self.generation = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=seconds),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=128),
            transport=transport,
            trust_env=False,
        )
        self._control = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(settings.generator_control_seconds, connect=CONNECT_SECONDS),
            transport=transport,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close both pools."""
        await self.generation.aclose()
        await self._control.aclose()

    def check_open(self, path: str) -> None:
        """Raise Unavailable when this engine was given up meanwhile; httpx would raise a bare RuntimeError."""
        if self.generation.is_closed:
            raise Unavailable(f"vLLM ended before {path} was sent; it is being restarted")

    async def healthy(self, seconds: float) -> bool:
        """Whether vLLM says that it is well, within this time."""
        if self._control.is_closed:
            return False
        try:
            return (await self._control.get("/health", timeout=seconds)).status_code == 200
        except httpx.HTTPError:
            return False

    async def metrics(self, seconds: float) -> str:
        """vLLM's metrics in Prometheus' text format. Raises RatchetError when it does not answer in time."""
        self.check_open("/metrics")
        try:
            return (await self._control.get("/metrics", timeout=seconds)).raise_for_status().text
        except httpx.HTTPStatusError as error:
            raise UpstreamFailed(f"vLLM answered /metrics with {error.response.status_code}") from error
        except httpx.HTTPError as error:
            raise transport_error(error, "/metrics", seconds) from error

    async def describe(self) -> EngineDescription:
        """dtype and context length of the running engine."""
        found = await self._rpc("describe_policy", {}, self._settings.generator_control_seconds)
        return EngineDescription.model_validate(found)

    async def load(self, folder: Path) -> None:
        """Load the weights of a checkpoint folder in place.

        Raises:
            UpstreamFailed: vLLM could not; its weights may be half of one policy and half of another.
        """
        found = await self._rpc("load_policy", {"weights_path": str(folder)}, self._settings.generator_load_seconds)
        if error := found.get("error"):
            raise UpstreamFailed(f"vLLM could not load {folder.name}: {error}")

    async def pause(self) -> None:
        """Abort what is still running in the engine (nobody listens to it any more) and schedule nothing."""
        await self._post("/pause?mode=abort", {}, self._settings.generator_control_seconds)

    async def resume(self) -> None:
        """Schedule again."""
        await self._post("/resume", {}, self._settings.generator_control_seconds)

    async def sleep(self) -> None:
        """Abort what still runs, move the weights to host memory and drop the KV cache (level 1 of vLLM's sleep).

        Raises:
            UpstreamFailed: vLLM says that it does not sleep. How much of the device it holds is then unknown.
        """
        await self._post("/sleep?level=1&mode=abort", {}, self._settings.generator_sleep_seconds)
        if not await self._sleeping():
            raise UpstreamFailed("vLLM answered /sleep and says that it is awake")

    async def wake_up(self) -> None:
        """Bring the weights back to the device, and schedule again.

        Raises:
            UpstreamFailed: vLLM says that it still sleeps.
        """
        found = await self._post("/wake_up", {}, self._settings.generator_sleep_seconds)
        if found.get("status") != "awake" or await self._sleeping():
            raise UpstreamFailed(f"vLLM answered /wake_up with {str(found)[:200]} and still sleeps")

    async def _sleeping(self) -> bool:
        path, seconds = "/is_sleeping", self._settings.generator_control_seconds
        self.check_open(path)
        try:
            response = await self._control.get(path, timeout=seconds)
        except httpx.HTTPError as error:
            raise transport_error(error, path, seconds) from error
        try:
            return bool(response.raise_for_status().json()["is_sleeping"])
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise UpstreamFailed(f"vLLM answered {path} with {response.status_code} {response.text[:200]}") from error

    async def reset_prefix_cache(self) -> None:
        """Forget the keys and values that the old weights made."""
        found = await self._post("/reset_prefix_cache", {}, self._settings.generator_control_seconds)
        if not found.get("success"):
            raise UpstreamFailed("vLLM could not reset its prefix cache: blocks are still held by running requests")

    async def prompt_logprobs(self, probes: Sequence[LogprobProbe]) -> list[Logprobs]:
        """Log-probs the engine gives the probes' tokens, `[probes][seq - 1]`, nats at temperature 1."""
        body = {
            "model": self._model,
            "prompt": [list(probe.token_ids) for probe in probes],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        found = await self._post("/v1/completions", body, self._settings.generator_proof_seconds)
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            return [
                tuple(
                    float(at[str(token)]["logprob"])
                    for at, token in zip(choice["prompt_logprobs"][1:], probe.token_ids[1:], strict=True)
                )
                for choice, probe in zip(choices, probes, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamFailed(f"vLLM gave no log-probs for the probes: {type(error).__name__}: {error}") from error

    async def sample(self, messages: list[dict[str, str]], group: SamplingGroup, max_tokens: int, seed: int) -> Any:
        """One chat completion with n responses, exact token ids and raw log-probs, as vLLM's JSON.

        Raises:
            EngineRejected: the request is at fault.
            Unavailable: the engine is gone.
        """
        # everything a checkpoint's generation_config.json could set is set here, or it would change what is sampled
        body = {
            "model": self._model, "messages": messages, "n": group.n, "max_tokens": max_tokens, "seed": seed,
            "temperature": group.temperature, "top_p": group.top_p, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
            "logprobs": True, "return_token_ids": True,
        }  # fmt: skip
        seconds = self._settings.generator_response_seconds
        return await self._post("/v1/chat/completions", body, seconds, client=self.generation)

    async def count_tokens(self, messages: list[dict[str, str]]) -> int:
        """Tokens of a conversation under the chat template, with the generation prompt."""
        body = {"model": self._model, "messages": messages}
        return int((await self._post("/tokenize", body, self._settings.generator_control_seconds))["count"])

    async def _rpc(self, method: str, arguments: dict[str, str], seconds: float) -> dict[str, Any]:
        found = await self._post(
            "/collective_rpc", {"method": method, "kwargs": arguments, "timeout": seconds}, seconds
        )
        results = found.get("results") or []
        if not results or not all(isinstance(result, dict) for result in results):
            raise UpstreamFailed(f"vLLM's workers answered {method} with {str(found)[:200]}")
        # with tensor parallelism each worker answers; one that failed speaks for all
        return next((result for result in results if result.get("error")), results[0])

    async def _post(
        self, path: str, body: dict[str, Any], seconds: float, client: httpx.AsyncClient | None = None
    ) -> Any:
        http = client or self._control
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=seconds)
        self.check_open(path)
        try:
            response = await http.post(path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise transport_error(error, path, seconds) from error
        if response.status_code >= 400:
            message, parameter = _openai_error(response)
            if response.status_code < 500:
                raise EngineRejected(f"vLLM refused {path}: {message}", parameter)
            raise Unavailable(f"vLLM answered {path} with {response.status_code}: {message}")
        try:
            return response.json() if response.content else {}
        except ValueError as error:
            raise UpstreamFailed(f"vLLM answered {path} with something that is not JSON") from error


def transport_error(error: httpx.HTTPError, path: str, seconds: float) -> RatchetError:
    """Our error for a broken or silent connection to vLLM."""
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return DeadlineExceeded(f"vLLM did not answer {path} within {seconds:g} s")
    return Unavailable(f"vLLM broke off {path} ({str(error) or type(error).__name__}); it is being restarted")


def _openai_error(response: httpx.Response) -> tuple[str, str | None]:
    try:
        error = response.json()["error"]
        return str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        return response.text[:300], None
