"""DPO with a thin subclass of TRL's DPOTrainer: exact token ids, no reference model in memory beside the policy."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from services.contracts.checkpoints import Lineage, Manifest
from services.contracts.errors import InvalidInput
from services.contracts.pairs import Pair
from services.contracts.training import DpoJob, TrainingResult
from services.platform.tables import from_parquet, read_metadata
from services.trainer.checkpoints import load_model, load_tokenizer, weights_hash
from services.trainer.forward import token_logprobs
from services.trainer.loop import Grouped, check_config, run_training, trl_arguments
from services.trainer.probes import candidate_windows
from services.trainer.reference import ReferenceLogprobs, reference_key, reference_logprobs, reference_path
from services.trainer.task import Finished, Task, drop_too_long, publish, save_policy

CHECKED_PAIRS = 8
"""Pairs whose token ids are decoded and compared with their text."""


class PairsTrainer(Grouped, DPOTrainer):
    """TRL's DPOTrainer on rows that are finished: token ids as sampled, reference log-probs given."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing to do. The stock method would render and tokenise the text again, and crashes on token ids alone."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing to do. The stock method takes the start model for the reference, and caches without max_length."""
        return dataset


def run_dpo(task: Task, job: DpoJob) -> TrainingResult:
    """Train a policy on preference pairs against the fixed reference, and publish it."""
    task.phase("preparing")
    start_manifest, start = task.open_checkpoint(job.start, "policy", "start")
    reference_manifest, reference = task.open_checkpoint(job.reference, "policy", "reference")
    files = {path: task.store.read_bytes(path) for path in job.pairs}
    check_tokenizers(start_manifest, reference_manifest, files)
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    tokenizer = load_tokenizer(start)
    check_config(job.config, AutoConfig.from_pretrained(str(start), local_files_only=True, trust_remote_code=False))
    pairs, dropped = fitting_pairs([pair for content in files.values() for pair in from_parquet(content, Pair)], job)
    check_token_ids(pairs, tokenizer)

    key = reference_key(
        list(hashes.values()),
        weights_hash(reference_manifest),
        job.config.max_length,
        "bfloat16" if job.config.bf16 else "float32",
    )
    task.phase("reference", 0, len(pairs))
    logprobs, computed = reference_logprobs(
        task.store,
        reference_path(job.pairs[0], key),
        pairs,
        reference,
        bf16=job.config.bf16,
        on_pairs=lambda done: task.phase("reference", done, len(pairs)),
    )
    gc.collect()

    model = load_model(start, "policy")
    windows = candidate_windows(
        [w for p in pairs for w in ((p.prompt_ids, p.chosen_ids), (p.prompt_ids, p.rejected_ids))]
    )
    before = [token_logprobs(model, window) for window in windows]
    trainer = make_trainer(task, job, model, tokenizer, pairs, logprobs)
    outcome = run_training(trainer, task, job.config)

    saved = save_policy(task, model, start, start_manifest, windows, before)
    return publish(
        task,
        job,
        Finished(
            kind="policy",
            model=saved.model,
            metrics={
                "examples": len(pairs),
                "dropped_too_long": dropped,
                "reference_computed": float(computed),
                "probe_shift": saved.shift,
            },
            lineage=Lineage(
                job_id=task.job_id, start=start_manifest.version, reference=reference_manifest.version, data=hashes
            ),
            logprob_probes=saved.probes,
            outcome=outcome,
        ),
    )


def make_trainer(
    task: Task, job: DpoJob, model: Any, tokenizer: Any, pairs: Sequence[Pair], logprobs: ReferenceLogprobs
) -> PairsTrainer:
    """The trainer over finished rows."""
    trainer = PairsTrainer(
        model=model,
        args=DPOConfig(
            **trl_arguments(job.config, task.workspace),
            beta=job.config.beta,
            loss_type=[job.config.loss_type],
            max_length=job.config.max_length,
            precompute_ref_log_probs=True,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_dict(
            {
                "prompt_ids": [list(pair.prompt_ids) for pair in pairs],
                "chosen_ids": [list(pair.chosen_ids) for pair in pairs],
                "rejected_ids": [list(pair.rejected_ids) for pair in pairs],
                "ref_chosen_logps": logprobs.chosen,
                "ref_rejected_logps": logprobs.rejected,
            }
        ),
        processing_class=tokenizer,
    )
    trainer.lengths = [pair_length(pair) for pair in pairs]
    return trainer


def pair_length(pair: Pair) -> int:
    """Tokens of the longer side."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def fitting_pairs(pairs: Sequence[Pair], job: DpoJob) -> tuple[list[Pair], int]:
    """Pairs that fit max_length, and how many do not. TRL would cut them, drop their end token and train on them."""
    if not pairs:
        raise InvalidInput(f"{', '.join(job.pairs)}: no pairs; training needs at least one", field="pairs")
    kept, dropped = drop_too_long([pair_length(pair) for pair in pairs], job.config.max_length, "pairs")
    return [pairs[i] for i in kept], dropped


def check_tokenizers(start: Manifest, reference: Manifest, files: dict[str, bytes]) -> None:
    """Start, reference and (where they say it) pairs must have one tokenizer: token ids mean nothing without it.

    Raises:
        InvalidInput: naming the one that differs.
    """
    if start.tokenizer_hash != reference.tokenizer_hash:
        raise InvalidInput(
            f"start {start.version!r} and reference {reference.version!r} have different tokenizers "
            f"({start.tokenizer_hash[:12]} and {reference.tokenizer_hash[:12]}); log-probs of one mean nothing to the "
            "other. Use a reference of the same family",
            field="reference",
        )
    for path, content in files.items():
        made_with = read_metadata(content).get("tokenizer_hash")
        if made_with is not None and made_with != start.tokenizer_hash:
            raise InvalidInput(
                f"{path} was sampled with another tokenizer ({made_with[:12]}) than start {start.version!r} has "
                f"({start.tokenizer_hash[:12]}); sample the pairs again",
                field="pairs",
            )


def check_token_ids(pairs: Sequence[Pair], tokenizer: Any) -> None:
    """The token ids must be of this tokenizer: in range, and decoding to the text beside them.

    Raises:
        InvalidInput: an id is out of range, or none of the first pairs decodes to its text.
    """
    size = len(tokenizer)
    for pair in pairs:
        highest = max(max(ids, default=0) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if highest >= size:
            raise InvalidInput(
                f"prompt {pair.prompt_id!r} has the token id {highest}, and the tokenizer has {size} tokens; the pairs "
                "were made with another tokenizer",
                field="pairs",
            )
    first = [pair for pair in pairs[:CHECKED_PAIRS] if pair.chosen]
    if first and not any(_decodes(tokenizer, pair) for pair in first):
        raise InvalidInput(
            f"the token ids of the first {len(first)} pairs do not decode to their text "
            f"({tokenizer.decode(first[0].chosen_ids, skip_special_tokens=True)[:60]!r} instead of "
            f"{first[0].chosen[-1].content[:60]!r}); the pairs were made with another tokenizer",
            field="pairs",
        )


def _decodes(tokenizer: Any, pair: Pair) -> bool:
    decoded = tokenizer.decode(list(pair.chosen_ids), skip_special_tokens=True)
    return decoded.strip() == pair.chosen[-1].content.strip()
