"""`POST /v1/rollouts`: many prompts, n responses each, one NDJSON line per finished prompt."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

from services.contracts.conversations import Prompt
from services.contracts.errors import InvalidInput, RatchetError, Unavailable, UpstreamFailed
from services.contracts.rollouts import (
    Response,
    Rollout,
    RolloutFailure,
    RolloutLine,
    RolloutRequest,
    Sampling,
    SamplingGroup,
)
from services.generator import metrics
from services.generator.engine_client import EngineClient, EngineDescription, EngineRejected
from services.platform.logs import get_logger

log = get_logger(__name__)

MAX_SEED = 2**31 - 1


def derive_seed(seed: int, prompt_id: str, group: int) -> int:
    """Seed of one vLLM request: a hash, so it depends on nothing but what is asked, whatever the order or chunk."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}\x00{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


def check_lengths(sampling: Sampling, engine: EngineDescription) -> None:
    """Refuse a max_tokens that leaves no room for any prompt.

    Raises:
        InvalidInput: naming field and limit.
    """
    if sampling.max_tokens >= engine.max_model_len:
        raise InvalidInput(
            f"max_tokens is {sampling.max_tokens} and the served context holds {engine.max_model_len} tokens, prompt "
            f"included; ask for fewer, or raise RATCHET_GENERATOR_MAX_MODEL_LEN",
            field="sampling.max_tokens",
        )


class RolloutSampler:
    """Samples all prompts of one request from one engine. The caller holds the gate, so the policy cannot change.

    Args:
        slots: Bounds the groups in flight over all rollouts of the service.
        stopping: Set when the service is told to stop: what is not finished fails, retryable.
    """

    def __init__(
        self,
        client: EngineClient,
        engine: EngineDescription,
        request: RolloutRequest,
        slots: asyncio.Semaphore,
        stopping: asyncio.Event,
    ) -> None:
        self._client = client
        self._engine = engine
        self._request = request
        self._slots = slots
        self._stopping = stopping

    async def lines(self) -> AsyncIterator[bytes]:
        """One JSON line per prompt, in order of completion; each prompt has exactly one."""
        tasks = {asyncio.create_task(self._line(prompt)) for prompt in self._request.prompts}
        try:
            for next_line in asyncio.as_completed(list(tasks)):
                line = await next_line
                yield line.model_dump_json(exclude_none=True).encode() + b"\n"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _line(self, prompt: Prompt) -> RolloutLine:
        # A prompt without a trace id of its own is logged with the request's, which is in the log's context.
        ids = {"prompt_id": prompt.id} | ({"trace_id": prompt.trace_id} if prompt.trace_id else {})
        started = time.monotonic()
        try:
            rollout = await self._rollout(prompt)
        except RatchetError as error:
            outcome = "retryable" if error.retryable else "failed"
            metrics.ROLLOUT_PROMPTS.labels(outcome).inc()
            log.warning("prompt_failed", **ids, code=error.code, detail=error.detail, retryable=error.retryable)
            return RolloutLine(failure=RolloutFailure(prompt_id=prompt.id, problem=error.problem()))
        seconds = time.monotonic() - started
        tokens = sum(len(response.token_ids) for response in rollout.responses)
        metrics.ROLLOUT_PROMPTS.labels("done").inc()
        metrics.ROLLOUT_PROMPT_SECONDS.observe(seconds)
        metrics.ROLLOUT_TOKENS.inc(tokens)
        log.info(
            "prompt_sampled", **ids, policy_version=rollout.policy_version, responses=len(rollout.responses),
            tokens=tokens, seconds=round(seconds, 3),
        )  # fmt: skip
        return RolloutLine(rollout=rollout)

    async def _rollout(self, prompt: Prompt) -> Rollout:
        groups = self._request.sampling.groups
        async with asyncio.TaskGroup() as running:
            asked = [running.create_task(self._guarded(prompt, index, group)) for index, group in enumerate(groups)]
        answers = [task.result() for task in asked]
        for answer in answers:
            if isinstance(answer, RatchetError):
                raise answer
        found = [answer for answer in answers if not isinstance(answer, RatchetError)]
        return Rollout(
            prompt_id=prompt.id,
            messages=prompt.messages,
            prompt_token_ids=found[0][0],
            responses=tuple(response for _, responses in found for response in responses),
            policy_version=self._request.policy_version,
            trace_id=prompt.trace_id,
        )

    async def _guarded(
        self, prompt: Prompt, index: int, group: SamplingGroup
    ) -> tuple[tuple[int, ...], list[Response]] | RatchetError:
        try:
            return await self._group(prompt, index, group)
        except RatchetError as error:
            return error

    async def _group(self, prompt: Prompt, index: int, group: SamplingGroup) -> tuple[tuple[int, ...], list[Response]]:
        seed = derive_seed(self._request.seed, prompt.id, index)
        messages = [message.model_dump() for message in prompt.messages]
        async with self._slots:
            if self._stopping.is_set():
                raise Unavailable("the generator is stopping; send the prompt again")
            try:
                answer = await self._client.sample(messages, group, self._request.sampling.max_tokens, seed)
            except EngineRejected as error:
                raise await self._explained(prompt, messages, error) from error
        found = read_answer(answer, group, seed)
        if len(found[0]) + self._request.sampling.max_tokens > self._engine.max_model_len:
            # vLLM lowers max_tokens without a word; dropping only the responses that were cut would bias the rest
            raise self._too_long(prompt, len(found[0]))
        return found

    async def _explained(self, prompt: Prompt, messages: list[dict[str, str]], error: EngineRejected) -> RatchetError:
        """Why vLLM refused a prompt. Nearly always it is too long; the exact figures are in the message."""
        tokens = await self._client.count_tokens(messages)
        if tokens + self._request.sampling.max_tokens > self._engine.max_model_len:
            return self._too_long(prompt, tokens)
        return InvalidInput(f"prompt {prompt.id!r}: {error.detail}", field="messages")

    def _too_long(self, prompt: Prompt, tokens: int) -> InvalidInput:
        return InvalidInput(
            f"prompt {prompt.id!r} has {tokens} tokens and max_tokens is {self._request.sampling.max_tokens}; together "
            f"they exceed the served context of {self._engine.max_model_len} tokens. Shorten the prompt, lower "
            "max_tokens, or raise RATCHET_GENERATOR_MAX_MODEL_LEN",
            field="messages",
        )


def read_answer(answer: Any, group: SamplingGroup, seed: int) -> tuple[tuple[int, ...], list[Response]]:
    """Prompt tokens and responses of a vLLM chat completion.

    Raises:
        UpstreamFailed: a response is missing, was aborted, or its tokens and log-probs do not match.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        prompt = tuple(answer["prompt_token_ids"])
        responses: list[Response] = []
        for choice in choices:
            tokens = tuple(choice["token_ids"])
            logprobs = [float(item["logprob"]) for item in choice["logprobs"]["content"]]
            if choice["finish_reason"] not in ("stop", "length"):
                # an engine that is being stopped answers `abort`: nothing is wrong with the prompt
                raise Unavailable(f"vLLM ended a response with {choice['finish_reason']!r}; send the prompt again")
            if len(tokens) != len(logprobs) or not tokens:
                raise UpstreamFailed(f"vLLM gave {len(tokens)} tokens with {len(logprobs)} log-probs")
            responses.append(
                Response(
                    text=choice["message"]["content"] or "",
                    token_ids=tokens,
                    logprob=sum(logprobs),
                    finish_reason=choice["finish_reason"],
                    temperature=group.temperature,
                    top_p=group.top_p,
                    seed=seed,
                    index=choice["index"],
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise UpstreamFailed(f"vLLM's answer lacks a part ({type(error).__name__}: {error})") from error
    if [response.index for response in responses] != list(range(group.n)):
        raise UpstreamFailed(f"vLLM gave {len(responses)} responses instead of {group.n}")
    return prompt, responses
