"""Supervised fine-tuning with TRL's SFTTrainer, on token ids and labels that we compute."""

from __future__ import annotations

import hashlib
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig as TrlSftConfig
from trl.trainer.sft_trainer import SFTTrainer

from services.contracts.checkpoints import Lineage
from services.contracts.training import SftJob, TrainingResult
from services.trainer.checkpoints import load_model, load_tokenizer
from services.trainer.data import read_demonstrations
from services.trainer.forward import token_logprobs
from services.trainer.loop import Grouped, check_config, run_training, trl_arguments
from services.trainer.probes import candidate_windows
from services.trainer.task import Finished, Task, drop_too_long, publish, save_policy
from services.trainer.tokens import IGNORED, LabelledSequence, encode_demonstrations


class DemonstrationTrainer(Grouped, SFTTrainer):
    """TRL's trainer with our order of the data."""


def run_sft(task: Task, job: SftJob) -> TrainingResult:
    """Train a policy to imitate, and publish it."""
    task.phase("preparing")
    manifest, start = task.open_checkpoint(job.start, "policy", "start")
    data = task.store.read_bytes(job.data)
    rows = read_demonstrations(data, job.data)
    tokenizer = load_tokenizer(start)
    model = load_model(start, "policy")
    check_config(job.config, model.config)
    sequences = encode_demonstrations(
        tokenizer, rows, assistant_only=job.config.assistant_only_loss, stop_ids=stop_ids(model, tokenizer)
    )
    kept, dropped = drop_too_long([len(s.input_ids) for s in sequences], job.config.max_length, "conversations")
    sequences = [sequences[i] for i in kept]
    windows = candidate_windows([split(sequence) for sequence in sequences])
    before = [token_logprobs(model, window) for window in windows]

    trainer = DemonstrationTrainer(
        model=model,
        args=TrlSftConfig(
            **trl_arguments(job.config, task.workspace),
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [s.input_ids for s in sequences], "labels": [s.labels for s in sequences]}
        ),
        processing_class=tokenizer,
    )
    trainer.lengths = [len(s.input_ids) for s in sequences]
    outcome = run_training(trainer, task, job.config)

    saved = save_policy(task, model, start, manifest, windows, before)
    return publish(
        task,
        job,
        Finished(
            kind="policy",
            model=saved.model,
            metrics={
                "examples": len(sequences),
                "dropped_too_long": dropped,
                "trained_tokens": sum(label != IGNORED for s in sequences for label in s.labels),
                "probe_shift": saved.shift,
            },
            lineage=Lineage(
                job_id=task.job_id, start=manifest.version, data={job.data: hashlib.sha256(data).hexdigest()}
            ),
            logprob_probes=saved.probes,
            outcome=outcome,
        ),
    )


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids generation stops at: those of generation_config.json and the tokenizer's eos."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*found, tokenizer.eos_token_id) if i is not None)


def split(sequence: LabelledSequence) -> tuple[list[int], list[int]]:
    """A sequence as prompt and response, at the first token that carries loss."""
    first = next((i for i, label in enumerate(sequence.labels) if label != IGNORED), 0)
    return sequence.input_ids[:first], sequence.input_ids[first:]
