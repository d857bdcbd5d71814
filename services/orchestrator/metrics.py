"""Prometheus metrics of the orchestrator; the naming scheme is in `services.platform.metrics`.

`ratchet_run_*` are the figures of the latest decided iteration of the newest runs. Prometheus keeps their history, so
one series per run and figure is enough; a run that is no longer among the newest loses its series.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.pairs import DropReason
from services.contracts.runs import IterationRecord, RunStatus, Stage
from services.platform.metrics import JOBS_DELAYED, JOBS_OLDEST, JOBS_WAITING
from services.platform.store import ArtifactStore

RECENT_RUNS = 20
"""Runs whose figures are shown: some 30 series each."""

RUNS = Gauge("ratchet_orchestrator_runs", "Runs by status.", ["status"])
CONDUCTING = Gauge("ratchet_orchestrator_conducting", "1 in the orchestrator that plans, 0 in one that waits.")
DECISIONS = Counter(
    "ratchet_orchestrator_decisions_total", "The gate's decisions: baseline, promoted, rejected.", ["outcome"]
)
ROLLBACKS = Counter("ratchet_orchestrator_rollbacks_total", "Rollbacks by hand that took effect.")
STAGE_SECONDS = Histogram(
    "ratchet_orchestrator_stage_seconds",
    "Time of each stage of the decided iterations, first job's start to last job's end.",
    ["stage"],
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 1800, 3600, 10800, 43200),
)
PROMPTS = Counter(
    "ratchet_orchestrator_prompts_total", "Prompts of finished pair jobs, by outcome: pair, dropped.", ["outcome"]
)
PROMPTS_DROPPED = Counter("ratchet_orchestrator_prompts_dropped_total", "Prompts that gave no pair.", ["reason"])
RESPONSES_DROPPED = Counter(
    "ratchet_orchestrator_responses_dropped_total", "Responses left out when pairs were made.", ["reason"]
)
STORE_FREE = Gauge("ratchet_orchestrator_store_free_bytes", "Free space of a local artifact store's disk.")
STORE_SIZE = Gauge("ratchet_orchestrator_store_size_bytes", "Size of a local artifact store's disk.")

RUN_STATUS = Gauge("ratchet_run_status", "1 for the status a run has, 0 for the others.", ["run", "status"])
RUN_ITERATION = Gauge("ratchet_run_iteration", "Last decided iteration.", ["run"])
RUN_ASKED = Gauge("ratchet_run_iterations_asked", "Iterations asked for in all.", ["run"])
RUN_STAGE_SECONDS = Gauge(
    "ratchet_run_stage_seconds", "Time of each stage of the last decided iteration.", ["run", "stage"]
)

FIGURES: dict[str, Gauge] = {
    field: Gauge(f"ratchet_run_{name}", text, ["run"])
    for field, name, text in (
        ("proxy_reward", "heldout_reward", "Mean reward of the candidate on the held-out prompts, raw logits."),
        ("incumbent_reward", "incumbent_reward", "Mean reward of the incumbent on the held-out prompts."),
        ("sampled_reward_mean", "sampled_reward", "Mean reward over all sampled responses."),
        ("sampled_reward_best", "sampled_best_reward", "Mean over prompts of the best response's reward."),
        ("sampled_reward_spread", "sampled_reward_spread", "Mean over prompts of best minus worst reward."),
        ("win_rate_vs_reference", "win_reference_ratio", "Held-out prompts won against the reference, ties half."),
        ("win_rate_vs_incumbent", "win_incumbent_ratio", "Held-out prompts won against the incumbent, ties half."),
        ("kl", "kl_nats", "Estimate of KL(policy || reference), nats per response."),
        ("response_tokens", "heldout_response_tokens", "Mean length of held-out responses."),
        ("sampled_response_tokens", "sampled_response_tokens", "Mean length of sampled responses."),
        ("truncated_fraction", "heldout_truncated_ratio", "Held-out responses that were cut off."),
        ("sampled_truncated_fraction", "sampled_truncated_ratio", "Sampled responses that were cut off."),
        ("duplicate_fraction", "duplicate_ratio", "Sampled responses identical to an earlier one of their prompt."),
        ("reward_length_correlation", "reward_length_correlation", "Mean per-prompt correlation of reward and length."),
        ("sampled_tokens_per_second", "sampled_tokens_per_second", "Generated tokens a second while sampling."),
        ("prompts", "prompts", "Prompts drawn."),
        ("pairs", "pairs", "Preference pairs made."),
        ("dpo_loss", "dpo_loss", "DPO loss, mean over the last epoch."),
        ("dpo_accuracy", "dpo_accuracy_ratio", "Pairs with a positive implicit margin, last epoch."),
        ("dpo_margin", "dpo_margin", "Mean implicit reward margin, last epoch."),
    )
}
"""Field of `IterationMetrics` -> its gauge."""
RUN_GAUGES = (RUN_STATUS, RUN_ITERATION, RUN_ASKED, RUN_STAGE_SECONDS, *FIGURES.values())

RESPONSE_REASONS = frozenset({DropReason.RESPONSE_TRUNCATED, DropReason.RESPONSE_EMPTY})

for _outcome in ("baseline", "promoted", "rejected"):
    DECISIONS.labels(_outcome)
for _reason in DropReason:
    (RESPONSES_DROPPED if _reason in RESPONSE_REASONS else PROMPTS_DROPPED).labels(_reason.value)
for _stage in Stage:
    STAGE_SECONDS.labels(_stage.value)


def show_runs(
    statuses: Mapping[str, RunStatus], decided: Mapping[str, Mapping[int, IterationRecord]], asked: Mapping[str, int]
) -> None:
    """Set the gauges of runs.

    Args:
        statuses: By run, oldest first.
        decided: Decided iterations by run.
        asked: Iterations asked for by run.
    """
    for status in RunStatus:
        RUNS.labels(status.value).set(sum(1 for found in statuses.values() if found is status))
    # Nothing awaits between clearing and setting, and scrapes are answered by the same event loop.
    for gauge in RUN_GAUGES:
        gauge.clear()
    for run in list(statuses)[-RECENT_RUNS:]:
        for status in RunStatus:
            RUN_STATUS.labels(run, status.value).set(statuses[run] is status)
        RUN_ASKED.labels(run).set(asked[run])
        if decided[run]:
            _show_record(decided[run][max(decided[run])])


def hide_runs() -> None:
    """This process does not conduct: another one shows the runs."""
    CONDUCTING.set(0)
    for gauge in (RUNS, JOBS_WAITING, JOBS_DELAYED, JOBS_OLDEST, *RUN_GAUGES):
        gauge.clear()


def count_decision(record: IterationRecord) -> None:
    """Count an iteration that was just published."""
    DECISIONS.labels(record.decision).inc()
    for stage, seconds in record.seconds_by_stage.items():
        STAGE_SECONDS.labels(stage).observe(seconds)


def count_pairs(pairs: int, dropped: Mapping[str, int]) -> None:
    """Count what became of an iteration's prompts."""
    PROMPTS.labels("pair").inc(pairs)
    for reason, count in dropped.items():
        if reason in RESPONSE_REASONS:
            RESPONSES_DROPPED.labels(reason).inc(count)
        else:
            PROMPTS_DROPPED.labels(reason).inc(count)
            PROMPTS.labels("dropped").inc(count)


def show_disk(store: ArtifactStore) -> None:
    """Measure the disk of a local store. Blocks; an object store has none."""
    if not store.is_local:
        return
    with suppress(OSError):  # a store that is away is readiness' business
        usage = shutil.disk_usage(store.url.removeprefix("file://"))
        STORE_FREE.set(usage.free)
        STORE_SIZE.set(usage.total)


def _show_record(record: IterationRecord) -> None:
    run = record.run_id
    RUN_ITERATION.labels(run).set(record.iteration)
    for stage, seconds in record.seconds_by_stage.items():
        RUN_STAGE_SECONDS.labels(run, stage).set(seconds)
    for field, gauge in FIGURES.items():
        value: float | None = getattr(record.metrics, field)
        if value is not None:
            gauge.labels(run).set(value)
