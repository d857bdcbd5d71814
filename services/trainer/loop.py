"""What the three trainings share: TRL's arguments from our config, the order of the data, the run with resume."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from services.contracts.errors import InvalidInput
from services.contracts.training import TrainingConfig, TrainingProgress
from services.trainer.progress import ProgressCallback, curve_of, metrics_of
from services.trainer.tracking import Curves
from services.trainer.workspace import Workspace, resumable_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, Trainer

    from services.trainer.task import Task

BUCKET_BATCHES = 4
"""Batches that are sorted by length together: enough to save padding, few enough to keep the order random."""


@dataclass(frozen=True)
class Outcome:
    """What a training run leaves besides its weights."""

    metrics: dict[str, float]
    curve: tuple[TrainingProgress, ...]
    resumed_from_step: int | None


class LengthGrouped(Sampler[int]):
    """Indices of one epoch: shuffled, then grouped by length within buckets, so that a batch pads little.

    The order depends on seed and epoch alone, not on a generator's state: a resumed training sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, trainer: Trainer) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.trainer = trainer

    def __len__(self) -> int:
        """Examples in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """The order of the epoch that begins (or goes on, after a resume) now."""
        return iter(
            epoch_order(self.lengths, self.batch_size, self.seed, int((self.trainer.state.epoch or 0.0) + 1e-6))
        )


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the examples in which neighbours have similar lengths."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    bucket = batch_size * BUCKET_BATCHES
    for begin in range(0, len(order), bucket):
        part = sorted(order[begin : begin + bucket], key=lambda i: -lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    # Only full batches move: the last, partial one stays last, or the batches after it would be cut elsewhere.
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    return [index for batch in mixed + rest for index in batch]


class Grouped:
    """Mixin over TRL's trainers: our order of the data, and no model card written beside every save."""

    lengths: Sequence[int] = ()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        trainer: Any = self
        return LengthGrouped(self.lengths, trainer.args.train_batch_size, trainer.args.seed, trainer)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest says what the checkpoint is; a card per save costs time and names our paths."""


def check_config(config: TrainingConfig, model: PretrainedConfig) -> None:
    """Refuse settings that could not take effect on this model.

    Raises:
        InvalidInput: naming the field, its value, what is allowed.
    """
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise InvalidInput(
            f"config.max_length {config.max_length} is more than the model's {longest} positions; at most {longest}",
            field="config.max_length",
        )


def trl_arguments(config: TrainingConfig, workspace: Workspace) -> dict[str, Any]:
    """Arguments that all of TRL's configs take."""
    cuda = torch.cuda.is_available()
    micro = config.micro_batch_size or config.train_batch_size
    schedule = config.lr_scheduler_type
    return {
        "output_dir": str(workspace.trainer),
        "learning_rate": config.learning_rate,
        # transformers' `constant` ignores the warm-up without a word
        "lr_scheduler_type": "constant_with_warmup" if schedule == "constant" and config.warmup_fraction else schedule,
        # a float below 1 is a part of all steps (transformers 5; `warmup_ratio` is gone)
        "warmup_steps": config.warmup_fraction,
        "num_train_epochs": config.num_train_epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.train_batch_size // micro,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.bf16,
        "fp16": False,
        "gradient_checkpointing": config.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "logging_strategy": "no",  # ProgressCallback asks for each log
        "logging_nan_inf_filter": False,  # it would hide a diverged loss
        "report_to": [],  # Curves passes the log on, to trackers in threads of their own
        "disable_tqdm": True,
        "seed": config.seed or 0,
        "use_cpu": not cuda,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "push_to_hub": False,
    }


def run_training(trainer: Trainer, task: Task, config: TrainingConfig) -> Outcome:
    """Train, from the last whole trainer checkpoint if there is one, and draw the figures from the trainer's log.

    What `config.report_to` names gets the log too.

    Raises:
        JobFailed: the loss became NaN or infinite.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    progress = ProgressCallback(task.report)
    checkpoint = resumable_checkpoint(task.workspace.trainer)
    with _curves(trainer, task, config):
        trainer.add_callback(progress)
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.monotonic() - started
    resumed = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else None
    metrics = metrics_of(trainer.state.log_history, config.num_train_epochs)
    metrics["train_seconds"] = round(seconds, 3)
    steps = trainer.state.global_step - (resumed or 0)
    metrics["examples_per_second"] = round(steps * config.train_batch_size / max(seconds, 1e-9), 2)
    if progress.tokens:
        metrics["tokens_per_second"] = round(progress.tokens / max(seconds, 1e-9), 1)
    return Outcome(metrics, curve_of(trainer.state.log_history, trainer.state.max_steps), resumed)


@contextmanager
def _curves(trainer: Trainer, task: Task, config: TrainingConfig) -> Generator[None]:
    """The trackers of `report_to`, before any other callback: they are to see the loss that ends a training.

    Whatever is wrong with them, also before their threads run, is told and costs the training nothing.
    """
    if not config.report_to or task.tracking is None:
        yield
        return
    try:
        curves = Curves(
            config.report_to, task.tracking, task.job_id, task.workspace.folder, trainer.args, task.tracker_failed
        )
    except Exception as error:
        curves = None
        why = (
            f"the trackers' folder {task.tracking.folder} cannot be used ({type(error).__name__}: {error}); name "
            "another in RATCHET_TRAINER_LOG_FOLDER"
        )
        for name in config.report_to:
            task.tracker_failed(name, why)
    if curves is None:
        yield
        return
    trainer.add_callback(curves)
    try:
        yield
    except BaseException:
        curves.close(failed=True)
        raise
    curves.close(failed=False)
