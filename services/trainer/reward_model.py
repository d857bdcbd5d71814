"""Bradley-Terry reward models with TRL's RewardTrainer: one label, and a pad token of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from services.contracts.checkpoints import CheckpointKind, Lineage
from services.contracts.errors import JobFailed
from services.contracts.training import RewardModelJob, TrainingResult
from services.trainer.checkpoints import load_model, load_tokenizer, save_weights
from services.trainer.data import Preference, read_preferences
from services.trainer.forward import scores
from services.trainer.loop import Grouped, check_config, run_training, trl_arguments
from services.trainer.losses import accuracy, bradley_terry_loss
from services.trainer.probes import score_probes
from services.trainer.task import Finished, Task, drop_too_long, publish
from services.trainer.tokens import encode_conversations, end_tokens

PAD_TOKEN = "<|pad|>"
PARITY_ROWS = 16
PARITY_TOLERANCE = 1e-3
"""fp32 sums in another order differ by 1e-6 of a score; the pad == eos trap by whole units (facts/stack.md)."""


class PreferenceTrainer(Grouped, RewardTrainer):
    """TRL's trainer with our order of the data."""


def run_reward_model(task: Task, job: RewardModelJob) -> TrainingResult:
    """Train a reward model, measure it on held-out pairs, prove it, and publish it."""
    task.phase("preparing")
    kind: CheckpointKind = task.store.manifest(job.start).kind if task.store.exists(job.start) else "policy"
    manifest, start = task.open_checkpoint(job.start, kind, "start")
    data = task.store.read_bytes(job.data)
    rows = read_preferences(data, job.data)
    heldout_data = task.store.read_bytes(job.heldout) if job.heldout else None
    heldout = read_preferences(heldout_data, job.heldout) if job.heldout and heldout_data is not None else []
    tokenizer = load_tokenizer(start)
    model = _scorer(start, kind, tokenizer, job.config.seed or 0)
    check_config(job.config, model.config)
    chosen, rejected, dropped = _encode(tokenizer, rows, job.config.max_length)

    trainer = PreferenceTrainer(
        model=model,
        args=RewardConfig(**trl_arguments(job.config, task.workspace), max_length=None, disable_dropout=True),
        train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
        processing_class=tokenizer,
    )
    trainer.lengths = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    outcome = run_training(trainer, task, job.config)

    task.phase("saving")
    folder = task.fresh_output()
    save_weights(model, folder, manifest.dtype)
    tokenizer.save_pretrained(str(folder))
    saved = load_model(folder, "reward_model")
    pad: Any = tokenizer.pad_token_id
    _prove_padding(saved, (chosen + rejected)[: 2 * PARITY_ROWS], pad)
    metrics: dict[str, float] = {"examples": len(chosen), "dropped_too_long": dropped}
    if heldout:
        metrics |= _measure(saved, tokenizer, heldout, job.config.max_length, pad)
    files = {job.data: data, **({job.heldout: heldout_data} if job.heldout and heldout_data is not None else {})}
    return publish(
        task,
        job,
        Finished(
            kind="reward_model",
            model=saved,
            metrics=metrics,
            lineage=Lineage(
                job_id=task.job_id,
                start=manifest.version,
                data={path: hashlib.sha256(content).hexdigest() for path, content in files.items()},
            ),
            score_probes=score_probes(saved, [row for pair in zip(chosen, rejected, strict=True) for row in pair], pad),
            outcome=outcome,
        ),
    )


def _scorer(start: Path, kind: CheckpointKind, tokenizer: Any, seed: int) -> Any:
    """The model with a one-label head (random, from the seed, on a policy) and a pad token that is not eos."""
    set_seed(seed)
    model = load_model(start, "reward_model", num_labels=1 if kind == "policy" else None)
    if tokenizer.pad_token is None or tokenizer.pad_token_id in end_tokens(tokenizer, model.config):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _encode(
    tokenizer: Any, rows: Sequence[Preference], max_length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    chosen = encode_conversations(tokenizer, [row.chosen for row in rows])
    rejected = encode_conversations(tokenizer, [row.rejected for row in rows])
    lengths = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    kept, dropped = drop_too_long(lengths, max_length, "pairs")
    return [chosen[i] for i in kept], [rejected[i] for i in kept], dropped


def _prove_padding(model: Any, rows: Sequence[Sequence[int]], pad: int) -> None:
    deviation = float(
        (scores(model, rows, pad_token_id=pad) - scores(model, rows, pad_token_id=pad, padded=False)).abs().max()
    )
    if not deviation <= PARITY_TOLERANCE:
        raise JobFailed(
            f"a padded batch scores differently from one conversation at a time (by {deviation:.3g}, allowed "
            f"{PARITY_TOLERANCE:g}): the pad token {pad} occurs in the text or equals eos. The model is not published"
        )


def _measure(model: Any, tokenizer: Any, rows: Sequence[Preference], max_length: int, pad: int) -> dict[str, float]:
    chosen, rejected, dropped = _encode(tokenizer, rows, max_length)
    high, low = scores(model, chosen, pad_token_id=pad), scores(model, rejected, pad_token_id=pad)
    return {
        "heldout_accuracy": accuracy(high, low),
        "heldout_loss": float(bradley_terry_loss(high, low).mean()),
        "heldout_margin": float((high - low).mean()),
        "heldout_examples": len(chosen),
        "heldout_dropped_too_long": dropped,
    }
