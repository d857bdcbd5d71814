"""Progress of a training: a callback that logs about once a second, and the figures drawn from the trainer's log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from services.contracts.errors import JobFailed
from services.contracts.training import TrainingProgress
from services.trainer.workspace import mark_complete

Report = Callable[[TrainingProgress], None]

LOG_SECONDS = 0.5
"""At least this often while steps finish; the queue publishes at most two events a second."""
CURVE_POINTS = 200
NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""Our name -> DPOTrainer's; RewardTrainer uses ours."""
MEANS = {
    "loss": "loss", "accuracy": "accuracy", "rewards/accuracies": "accuracy", "margin": "margin",
    "rewards/margins": "margin", "rewards/chosen": "rewards_chosen", "rewards/rejected": "rewards_rejected",
    "logps/chosen": "logps_chosen", "logps/rejected": "logps_rejected", "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy", "grad_norm": "grad_norm",
}  # fmt: skip
"""The trainers' names of logged figures -> names in `TrainingResult.metrics`."""


class ProgressCallback(TrainerCallback):
    """Reports steps, stops a training that has diverged, and marks trainer checkpoints that are whole."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.started = self.logged = time.monotonic()
        self.first_step = 0
        self.last_tokens = 0.0
        self.tokens = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; a resumed training begins at a later step."""
        self.started = self.logged = time.monotonic()
        self.first_step = state.global_step
        self.report(TrainingProgress(phase="training", step=state.global_step, total_steps=state.max_steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log by time, so that quick steps do not pay for it; and so often that the curve has its points."""
        due = time.monotonic() - self.logged >= LOG_SECONDS
        every = math.ceil(state.max_steps / CURVE_POINTS)
        if due or state.global_step % every == 0 or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Turn a log entry into a progress event.

        Raises:
            JobFailed: the loss is not finite.
        """
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise JobFailed(
                f"the loss is {logs['loss']} at step {state.global_step} of {state.max_steps}: the training diverged. "
                "Lower learning_rate, or raise warmup_fraction",
                field="config.learning_rate",
            )
        now = time.monotonic()
        tokens = float(logs.get("num_tokens", 0.0))
        rate = (tokens - self.last_tokens) / max(now - self.logged, 1e-9)
        per_step = (now - self.started) / max(1, state.global_step - self.first_step)
        self.last_tokens, self.logged, self.tokens = tokens, now, tokens
        point = _point(logs | {"step": state.global_step}, state.max_steps)
        self.report(
            point.model_copy(
                update={
                    "tokens_per_second": round(rate, 1) if tokens else None,
                    "seconds_left": round(per_step * (state.max_steps - state.global_step), 2),
                }
            )
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """transformers has written the last file of this checkpoint and removed the oldest."""
        mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def curve_of(history: Sequence[dict[str, Any]], total_steps: int) -> tuple[TrainingProgress, ...]:
    """The logged steps as progress points, thinned to at most CURVE_POINTS; the first and the last stay."""
    points = [_point(entry, total_steps) for entry in history if "loss" in entry]
    if len(points) <= CURVE_POINTS:
        return tuple(points)
    stride = (len(points) - 1) / (CURVE_POINTS - 1)
    return tuple(points[round(i * stride)] for i in range(CURVE_POINTS))


def metrics_of(history: Sequence[dict[str, Any]], epochs: float) -> dict[str, float]:
    """Figures of a finished training, each log entry weighted by the steps it stands for.

    `loss`, `accuracy`, `margin`, … are means over the last epoch (of all steps if there is but one), `mean_loss` over
    all steps, `first_loss` is the first entry's.
    """
    entries = [entry for entry in history if "loss" in entry]
    if not entries:
        return {}
    weights = [
        entry["step"] - before for entry, before in zip(entries, [0, *(e["step"] for e in entries)], strict=False)
    ]
    last_from = max(0.0, min(epochs, entries[-1].get("epoch", epochs)) - 1.0)
    late = [(e, w) for e, w in zip(entries, weights, strict=True) if e.get("epoch", epochs) > last_from + 1e-6]
    late = late or [(entries[-1], 1)]
    found: dict[str, float] = {}
    for name, ours in MEANS.items():
        have = [(float(entry[name]), weight) for entry, weight in late if name in entry]
        if have:
            found[ours] = sum(v * w for v, w in have) / sum(w for _, w in have)
    found["mean_loss"] = sum(e["loss"] * w for e, w in zip(entries, weights, strict=True)) / sum(weights)
    found["first_loss"] = float(entries[0]["loss"])
    found["steps"] = float(entries[-1]["step"])
    return found


def _point(entry: dict[str, Any], total_steps: int) -> TrainingProgress:
    def figure(name: str) -> float | None:
        value = entry.get(name, entry.get(NAMES.get(name, name)))
        return None if value is None else float(value)

    return TrainingProgress(
        phase="training",
        step=int(entry["step"]),
        total_steps=total_steps,
        epoch=float(entry.get("epoch") or 0.0),
        loss=figure("loss"),
        accuracy=figure("accuracy"),
        margin=figure("margin"),
        learning_rate=figure("learning_rate"),
        grad_norm=figure("grad_norm"),
    )
