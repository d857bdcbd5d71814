"""Sequences of concurrent requests, batched by length under a token budget, computed by one worker thread.

Requests meet in one bounded queue. The worker always computes the batch that holds the oldest sequence, filled with
those nearest to it in length from every request for the same scorer: little padding, no starvation. A request whose
caller has gone is dropped; a sequence that breaks its batch fails alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.contracts.errors import InvalidInput, Overloaded, RatchetError, Unavailable
from services.platform.logs import get_logger
from services.reward import metrics
from services.reward.scorers import Scorer, TokenSequence

log = get_logger(__name__)

LOOKAHEAD_SEQUENCES = 2048
"""How many of the oldest sequences are sorted by length for the next batch: 0.5 ms, and plenty to find equals among."""
RETRY_AFTER_SECONDS = (1.0, 60.0)
"""Least and most that a refused caller is asked to wait."""
STARTING_TOKENS_PER_SECOND = 2000.0
"""Guess for the first Retry-After, before anything was measured."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of the queue and of one forward pass; see `RewardSettings`."""

    batch_tokens: int = 8192
    batch_sequences: int = 256
    queued_tokens: int = 4_000_000
    stuck_seconds: float = 300.0


def plan_batch(lengths: Sequence[int], limits: BatchLimits) -> list[int]:
    """Indices of the next batch: the one that holds sequence 0 when all are cut by descending length.

    A batch's cost is its longest sequence times its size (that is what padding makes it) and stays within
    `batch_tokens`, unless one sequence alone is longer.
    """
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = (len(batch) + 1) * longest > limits.batch_tokens or len(batch) >= limits.batch_sequences
        if batch and full:
            if 0 in batch:
                break
            batch = []
        if not batch:
            longest = lengths[index]
        batch.append(index)
    return batch


@dataclass(eq=False)
class _Ticket:
    """One request in the queue. Only the worker writes `values`; `closed` means that nobody waits any more."""

    scorer: Scorer
    values: list[float]
    missing: int
    answer: Callable[[list[float] | Exception], None]
    closed: bool = False


@dataclass(frozen=True, eq=False)
class _Entry:
    ticket: _Ticket
    index: int
    sequence: TokenSequence


@dataclass(frozen=True)
class _Running:
    what: str
    since: float = field(default_factory=time.monotonic)


class BatchQueue:
    """The bounded queue and its worker thread. `submit` from the event loop; `close` ends the thread."""

    def __init__(self, limits: BatchLimits, *, prepare_thread: Callable[[], None] = lambda: None) -> None:
        self.limits = limits
        self._prepare_thread = prepare_thread
        self._entries: list[_Entry] = []
        self._queued_tokens = 0
        self._ready = threading.Condition()
        self._closing = False
        self._running: _Running | None = None
        self._tokens_per_second = STARTING_TOKENS_PER_SECOND
        self._thread = threading.Thread(target=self._work, name="reward-batches", daemon=True)
        self._thread.start()

    def refuse_when_full(self) -> None:
        """Raise Overloaded when the queue is full already: asked before a request costs any work."""
        if self._queued_tokens >= self.limits.queued_tokens:
            raise self._overloaded(0)

    async def submit(self, scorer: Scorer, sequences: Sequence[TokenSequence]) -> list[float]:
        """Values of the sequences, in their order. Cancelling the caller drops what is still waiting.

        Raises:
            Overloaded: the queue is full; carries Retry-After.
            InvalidInput: the request alone is larger than the queue.
            RatchetError: whatever the scorer said to one of the sequences.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[float]] = loop.create_future()

        def settle(outcome: list[float] | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        def answer(outcome: list[float] | Exception) -> None:
            try:
                loop.call_soon_threadsafe(settle, outcome)
            except RuntimeError:
                log.warning("answer_without_event_loop", scorer=scorer.info.name)

        ticket = _Ticket(scorer, [float("nan")] * len(sequences), len(sequences), answer)
        self._enqueue([_Entry(ticket, index, sequence) for index, sequence in enumerate(sequences)])
        try:
            with metrics.QUEUE_SECONDS.labels(scorer.info.name).time():
                return await future
        except asyncio.CancelledError:
            ticket.closed = True
            with self._ready:
                self._drop_closed()
            raise

    def _enqueue(self, entries: list[_Entry]) -> None:
        tokens = sum(len(entry.sequence.token_ids) for entry in entries)
        if tokens > self.limits.queued_tokens:
            raise InvalidInput(
                f"the request holds {tokens:,} tokens and at most {self.limits.queued_tokens:,} may wait; send fewer "
                "items at a time, or raise RATCHET_REWARD_MAX_QUEUED_TOKENS",
                field="items",
            )
        with self._ready:
            if self._closing:
                raise Unavailable("the reward service is stopping; send the request again once it is back")
            if self._queued_tokens + tokens > self.limits.queued_tokens:
                raise self._overloaded(tokens)
            self._entries.extend(entries)
            self._count(tokens)
            self._ready.notify()

    def _overloaded(self, tokens: int) -> Overloaded:
        least, most = RETRY_AFTER_SECONDS
        metrics.REFUSED.inc()
        return Overloaded(
            f"{self._queued_tokens:,} tokens wait to be scored, the request holds {tokens:,}, and at most "
            f"{self.limits.queued_tokens:,} may wait; come again after Retry-After",
            retry_after_seconds=min(most, max(least, self._queued_tokens / self._tokens_per_second)),
        )

    def _count(self, tokens: int) -> None:
        self._queued_tokens += tokens
        metrics.QUEUED_TOKENS.set(self._queued_tokens)
        metrics.QUEUED_SEQUENCES.set(len(self._entries))

    def _drop_closed(self) -> None:
        gone = sum(len(entry.sequence.token_ids) for entry in self._entries if entry.ticket.closed)
        if gone:
            self._entries = [entry for entry in self._entries if not entry.ticket.closed]
            self._count(-gone)

    def _next_batch(self) -> list[_Entry] | None:
        with self._ready:
            while not self._entries and not self._closing:
                self._ready.wait()
            if self._closing:
                return None
            scorer = self._entries[0].ticket.scorer
            near = [entry for entry in self._entries[:LOOKAHEAD_SEQUENCES] if entry.ticket.scorer is scorer]
            chosen = [near[i] for i in plan_batch([len(entry.sequence.token_ids) for entry in near], self.limits)]
            taken = set(map(id, chosen))
            self._entries = [entry for entry in self._entries if id(entry) not in taken]
            self._count(-sum(len(entry.sequence.token_ids) for entry in chosen))
            return chosen

    def _work(self) -> None:
        self._prepare_thread()
        while (batch := self._next_batch()) is not None:
            tokens = sum(len(entry.sequence.token_ids) for entry in batch)
            name = batch[0].ticket.scorer.info.name
            self._running = _Running(f"a batch of {len(batch)} sequences ({tokens:,} tokens) of scorer {name!r}")
            started = time.monotonic()
            try:
                self._compute(batch)
            except Exception as error:  # the thread must outlive whatever happens to one batch
                log.error("batch_failed", scorer=name, exc_info=error)
                self._fail(batch, error)
            finally:
                self._running = None
            rate = tokens / max(time.monotonic() - started, 1e-6)
            self._tokens_per_second += 0.2 * (rate - self._tokens_per_second)

    def _compute(self, batch: list[_Entry]) -> None:
        batch = [entry for entry in batch if not entry.ticket.closed]
        if not batch:
            return
        scorer = batch[0].ticket.scorer
        lengths = [len(entry.sequence.token_ids) for entry in batch]
        try:
            with metrics.BATCH_SECONDS.labels(scorer.info.name).time():
                values = scorer.evaluate([entry.sequence for entry in batch])
            if len(values) != len(batch):
                raise RuntimeError(f"{len(batch)} sequences gave {len(values)} values")
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch, error)
                return
            metrics.BATCH_SPLITS.labels(scorer.info.name).inc()
            log.warning("batch_split", scorer=scorer.info.name, sequences=len(batch), error=str(error)[:300])
            middle = len(batch) // 2
            self._compute(batch[:middle])
            self._compute(batch[middle:])
            return
        metrics.BATCH_SEQUENCES.labels(scorer.info.name).observe(len(batch))
        metrics.RESPONSES.labels(scorer.info.name).inc(len(batch))
        metrics.TOKENS.labels(scorer.info.name, "text").inc(sum(lengths))
        metrics.TOKENS.labels(scorer.info.name, "padding").inc(max(lengths) * len(batch) - sum(lengths))
        for entry, value in zip(batch, values, strict=True):
            ticket = entry.ticket
            ticket.values[entry.index] = value
            ticket.missing -= 1
            if ticket.missing == 0 and not ticket.closed:
                ticket.closed = True
                ticket.answer(ticket.values)

    def _fail(self, entries: list[_Entry], error: Exception) -> None:
        for entry in entries:
            if not entry.ticket.closed:
                entry.ticket.closed = True
                problem = _as_problem(error, entry)
                metrics.ERRORS.labels(entry.ticket.scorer.info.name, problem.code).inc()
                entry.ticket.answer(problem)
        with self._ready:
            self._drop_closed()

    def trouble(self) -> str | None:
        """What is wrong with the worker, as a sentence; None when it works or has nothing to do."""
        running = self._running
        if running and (seconds := time.monotonic() - running.since) > self.limits.stuck_seconds:
            return (
                f"{running.what} has been computed for {seconds:.0f} s, longer than RATCHET_REWARD_STUCK_SECONDS = "
                f"{self.limits.stuck_seconds:g}; restart the service"
            )
        if not self._thread.is_alive() and not self._closing:
            return "the batch worker thread has ended; restart the service"
        return None

    def close(self, timeout_seconds: float = 10.0) -> None:
        """End the worker after its present batch; requests still waiting get Unavailable."""
        with self._ready:
            self._closing = True
            waiting = {id(entry.ticket): entry.ticket for entry in self._entries}
            self._entries = []
            self._count(-self._queued_tokens)
            self._ready.notify_all()
        for ticket in waiting.values():
            ticket.closed = True
            ticket.answer(Unavailable("the reward service is stopping; send the request again once it is back"))
        self._thread.join(timeout_seconds)


def _as_problem(error: Exception, entry: _Entry) -> RatchetError:
    if isinstance(error, RatchetError):
        return error
    place, name = entry.sequence.place, entry.ticket.scorer.info.name
    return RatchetError(
        f"{place}: scorer {name!r} failed on its {len(entry.sequence.token_ids):,} tokens with "
        f"{type(error).__name__}: {str(error)[:300]}; see the service's log",
        field=place,
    )
