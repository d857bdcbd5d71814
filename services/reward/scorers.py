"""What a scorer is to the rest of the service, and the registry of those that have proved themselves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services.contracts.errors import Conflict, InvalidInput, NotFound, RatchetError, ScoreInvalid, Unavailable
from services.contracts.scores import ScorerInfo, ScorerSpec
from services.platform.logs import get_logger
from services.reward import metrics

log = get_logger(__name__)


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with one response, as token ids, and where in the request it came from."""

    token_ids: list[int]
    place: str
    """`items.3.responses.2`: how errors name it."""
    response_start: int = 0
    """Index of the response's first token, for scorers that look at the response only."""


class Scorer(Protocol):
    """A loaded model that gives one number for each sequence."""

    @property
    def info(self) -> ScorerInfo:
        """Name, spec, revision and measured proofs."""
        ...

    def evaluate(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """One value for each sequence, in order, in one forward pass. Blocks; called by the worker thread only."""
        ...


AnyScorer = TypeVar("AnyScorer", bound=Scorer)
Loader = Callable[[str, ScorerSpec], Scorer]
"""Checks, loads and proves a scorer; blocks. Raises CheckpointRefused or InvalidInput instead of giving a bad one."""


class ScorerRegistry:
    """The scorers that serve, by name. Only proven ones ever enter; one is loaded at a time, while the others serve."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._scorers: dict[str, Scorer] = {}
        self._loading: dict[str, tuple[ScorerSpec, asyncio.Task[ScorerInfo]]] = {}
        self._one_load = asyncio.Lock()
        self._failures: dict[str, str] = {}

    def get(self, name: str, revision: str | None, wanted: type[AnyScorer]) -> AnyScorer:
        """The scorer of that name.

        Raises:
            Unavailable: it is being loaded for the first time.
            NotFound: nothing of that name; the message lists what is loaded.
            Conflict: another revision is loaded than the one asked for.
            InvalidInput: it is of another kind than this route needs.
        """
        scorer = self._scorers.get(name)
        if scorer is None:
            if name in self._loading:
                raise Unavailable(
                    f"scorer {name!r} is being loaded; try again soon", field="scorer", retry_after_seconds=2
                )
            raise self._unknown(name)
        if revision is not None and revision != scorer.info.revision:
            raise Conflict(
                f"scorer {name!r} is at revision {scorer.info.revision!r}, not {revision!r}; load the other one with "
                f"PUT /v1/scorers/{name}, or ask for the loaded one",
                field="revision",
            )
        if not isinstance(scorer, wanted):
            raise InvalidInput(
                f"scorer {name!r} is of kind {scorer.info.spec.kind}, which does not answer this route; "
                f"loaded: {self._listing()}",
                field="scorer",
            )
        return scorer

    def info(self, name: str) -> ScorerInfo:
        """One scorer's info. Raises NotFound listing the loaded names."""
        if name not in self._scorers:
            raise self._unknown(name)
        return self._scorers[name].info

    def infos(self) -> list[ScorerInfo]:
        """All loaded scorers, by name."""
        return [self._scorers[name].info for name in sorted(self._scorers)]

    async def put(self, name: str, spec: ScorerSpec) -> ScorerInfo:
        """Make `name` be what `spec` says. The same spec is a no-op; the old scorer serves until the new one is proven.

        A load goes on when its caller leaves; asking again joins it.

        Raises:
            CheckpointRefused, InvalidInput: the new one was refused; what served before still serves.
        """
        loading = self._loading.get(name)
        if loading and loading[0] == spec:
            return await asyncio.shield(loading[1])
        if not loading and name in self._scorers and self._scorers[name].info.spec == spec:
            return self._scorers[name].info
        task = asyncio.create_task(self._replace(name, spec))
        entry = self._loading[name] = (spec, task)

        def forget(done: asyncio.Task[ScorerInfo]) -> None:
            if self._loading.get(name) is entry:
                del self._loading[name]
            if not done.cancelled():
                done.exception()  # retrieved: it was logged, and its caller may be gone

        task.add_done_callback(forget)
        return await asyncio.shield(task)

    async def _replace(self, name: str, spec: ScorerSpec) -> ScorerInfo:
        async with self._one_load:
            log.info("scorer_loading", scorer=name, kind=spec.kind, checkpoint=spec.checkpoint)
            try:
                with metrics.LOAD_SECONDS.time():
                    scorer = await asyncio.to_thread(self._load, name, spec)
            except Exception as error:
                detail = error.detail if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"
                self._failures[name] = detail
                metrics.LOADS.labels("refused").inc()
                log.error("scorer_refused", scorer=name, detail=detail, exc_info=not isinstance(error, RatchetError))
                raise
            self._scorers[name] = scorer
            metrics.LOADS.labels("done").inc()
            metrics.INVALID.labels(name)  # at 0: an alert watches it
            metrics.SCORERS.set(len(self._scorers))
            self._failures.pop(name, None)
            log.info("scorer_loaded", scorer=name, revision=scorer.info.revision, proofs=scorer.info.proofs)
            return scorer.info

    async def delete(self, name: str) -> None:
        """Forget a scorer, after any load in progress; requests it has accepted are still answered. Raises NotFound."""
        async with self._one_load:
            self._failures.pop(name, None)
            if self._scorers.pop(name, None) is None:
                raise self._unknown(name)
            metrics.SCORERS.set(len(self._scorers))
            log.info("scorer_deleted", scorer=name)

    def trouble(self) -> str | None:
        """Why no request can be scored, with the remedy; None when at least one scorer serves."""
        if self._scorers:
            return None
        if self._loading:
            return f"loading and proving: {', '.join(sorted(self._loading))}"
        remedy = "load one with PUT /v1/scorers/{name}, or set RATCHET_REWARD_SCORERS"
        if self._failures:
            said = "; ".join(f"{name}: {detail}" for name, detail in sorted(self._failures.items()))
            return f"no scorer is loaded; the last load failed ({said}); mend that, or {remedy}"
        return f"no scorer is loaded; {remedy}"

    def _listing(self) -> str:
        return ", ".join(f"{info.name} ({info.spec.kind})" for info in self.infos()) or "none"

    def _unknown(self, name: str) -> NotFound:
        return NotFound(
            f"no scorer {name!r}; loaded: {self._listing()}; load it with PUT /v1/scorers/{name}", field="scorer"
        )


def group_values(values: Sequence[float], sequences: Sequence[TokenSequence], counts: Sequence[int], what: str,
                 scorer: ScorerInfo) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Flat values as `[items][responses]`.

    Raises:
        ScoreInvalid: a value is missing, NaN or infinite; it names the item and the response. There is no default.
    """
    if len(values) != sum(counts) or len(sequences) != sum(counts):
        metrics.INVALID.labels(scorer.name).inc()
        raise ScoreInvalid(f"{sum(counts)} responses were sent and {len(values)} came back with a {what}")
    for value, sequence in zip(values, sequences, strict=True):
        if not math.isfinite(value):
            metrics.INVALID.labels(scorer.name).inc()
            raise ScoreInvalid(
                f"scorer {scorer.name!r} (revision {scorer.revision!r}) gave {sequence.place} the {what} {value}; "
                "it is not replaced by a default: check the model, or compute it in float32 (RATCHET_REWARD_DTYPE)",
                field=sequence.place,
            )
    remaining = iter(values)
    return tuple(tuple(next(remaining) for _ in range(count)) for count in counts)
