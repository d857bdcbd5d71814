"""import_model: a Hugging Face folder or hub model into the store, checked before anything else may rest on it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from services.contracts.checkpoints import CheckpointKind, Lineage
from services.contracts.conversations import Message
from services.contracts.errors import CheckpointRefused, InvalidInput
from services.contracts.training import ImportModelJob, TrainingResult
from services.trainer.checkpoints import load_model, load_tokenizer, safetensors_header
from services.trainer.probes import candidate_windows, logprob_probes, score_probes
from services.trainer.task import Finished, Task, publish
from services.trainer.tokens import encode_conversations, end_tokens, render

DESCRIPTION_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB = re.compile(r"hub:(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
STORE = re.compile(r"store:(?P<folder>.+)")
NEUTRAL = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("Write one line about the sea.", "The sea is deep and wide."),
)


def run_import(task: Task, job: ImportModelJob) -> TrainingResult:
    """Check a model, link or copy its files, add probes and manifest, and publish it."""
    task.phase("preparing")
    source, inside = locate(task, job.source)
    files = [*weight_files(source), *description_files(source)]
    config = read_config(source)
    check_architecture(config, job.model_kind, source.name)
    folder = task.fresh_output()
    for name in files:
        take(source / name, folder / name, inside)
    tokenizer = open_tokenizer(folder)
    model = load_model(folder, job.model_kind)
    if job.model_kind == "policy":
        finished = _finish_policy(task, folder, tokenizer, model)
    else:
        finished = _finish_reward_model(task, tokenizer, model)
    task.phase("saving")
    return publish(task, job, finished)


def locate(task: Task, source: str) -> tuple[Path, Path]:
    """The source as a local folder, and the folder that links in it may not leave.

    Raises:
        InvalidInput: neither form of source, or the hub is not allowed or not reachable.
    """
    if match := STORE.fullmatch(source):
        folder = task.store.staged_folder(match["folder"])
        return folder, Path(os.path.realpath(folder))
    match = HUB.fullmatch(source)
    if not match:
        raise InvalidInput(
            f"source {source!r} is neither 'store:<folder>' nor 'hub:owner/name[@revision]'", field="source"
        )
    if not task.allow_hub:
        raise InvalidInput(
            f"source {source!r} needs the hub, and this trainer may not use it; set RATCHET_TRAINER_ALLOW_HUB=true, or "
            "put the folder into the store and name it 'store:staging/…'",
            field="source",
        )
    from huggingface_hub import snapshot_download

    try:
        local = snapshot_download(
            match["name"], revision=match["revision"], allow_patterns=[*DESCRIPTION_FILES, INDEX, "*.safetensors"],
        )  # fmt: skip
    except Exception as error:
        raise InvalidInput(
            f"{source} cannot be had from the hub: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]} "
            "(name, revision, access, or HF_HUB_OFFLINE)",
            field="source",
        ) from error
    return Path(local), Path(local).parents[1]


def read_config(source: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointRefused."""
    try:
        config = json.loads((source / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise _refused(f"{source.name} has no config.json; it is not a Hugging Face model folder") from error
    except ValueError as error:
        raise _refused(f"config.json of {source.name} is not JSON ({error})") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise _refused(f"config.json of {source.name} names no architectures; save the model with save_pretrained")
    if config.get("auto_map"):
        raise _refused(f"config.json of {source.name} asks for custom code (auto_map), which is never run")
    return config


def check_architecture(config: dict[str, Any], kind: CheckpointKind, name: str) -> None:
    """A policy is a causal language model, a reward model a sequence classifier. Raises CheckpointRefused."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    found, model_type = config["architectures"][0], config.get("model_type")
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind == "policy" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    allowed = names.get(model_type)
    if allowed is None:
        raise _refused(f"{name} has the model_type {model_type!r}, for which transformers knows no {kind} class")
    if found not in (allowed if isinstance(allowed, tuple) else (allowed,)):
        raise _refused(
            f"{name} is a {found}, and a {kind} of type {model_type!r} must be a {allowed}; check model_kind"
        )


def weight_files(source: Path) -> list[str]:
    """Names of the weight files, each checked for its length. Raises CheckpointRefused."""
    if (source / INDEX).is_file():
        try:
            names = sorted(set(json.loads((source / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise _refused(f"{INDEX} of {source.name} is not an index of shards ({error})") from error
        absent = [name for name in names if "/" in name or not (source / name).is_file()]
        if absent:
            raise _refused(
                f"{source.name} is half-written: {len(absent)} of {len(names)} shards of {INDEX} are missing "
                f"({', '.join(absent[:3])}); copy or download them"
            )
        files = [*names, INDEX]
    elif (source / SINGLE).is_file():
        names = files = [SINGLE]
    else:
        pickles = sorted(file.name for file in source.glob("*") if file.suffix in PICKLES)
        if pickles:
            raise _refused(
                f"{source.name} has only pickle weights ({pickles[0]}), which run code when read. Convert them "
                "where you trust them: AutoModel….from_pretrained(folder).save_pretrained(new) writes safetensors"
            )
        raise _refused(f"{source.name} has no weights ({SINGLE}, or shards with {INDEX}); copy or download them")
    for name in names:
        safetensors_header(source / name)
    return files


def description_files(source: Path) -> list[str]:
    """Names of the other files worth keeping: configuration and tokenizer."""
    return [name for name in DESCRIPTION_FILES if (source / name).is_file()]


def take(file: Path, target: Path, inside: Path) -> None:
    """Hard-link a file, or copy it across disks. A link that leads out of the source's home is refused."""
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(inside):
        raise _refused(f"{file.name} is a link that leaves {inside.name}; put the file itself there")
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises CheckpointRefused."""
    try:
        return load_tokenizer(folder)
    except Exception as error:
        raise _refused(f"the tokenizer is missing or does not load: {str(error).strip()[:300]}") from error


def neutral_conversations() -> list[tuple[Message, ...]]:
    """A few harmless conversations for probes."""
    return [(Message(role="user", content=q), Message(role="assistant", content=a)) for q, a in NEUTRAL]


def _finish_policy(task: Task, folder: Path, tokenizer: Any, model: Any) -> Finished:
    if not tokenizer.chat_template:
        raise _refused(
            "the tokenizer has no chat template, and prompts here are conversations. Put a chat_template.jinja beside "
            "tokenizer.json (the template of the model's family), or set tokenizer.chat_template and save_pretrained"
        )
    if not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(str(folder))
    windows = candidate_windows(
        [
            (_ids(tokenizer, render(tokenizer, c[:1], generate=True)), _ids(tokenizer, c[1].content))
            for c in neutral_conversations()
        ]
    )
    probes, _ = logprob_probes(model, windows)
    return Finished("policy", model, {}, Lineage(job_id=task.job_id), logprob_probes=probes)


def _finish_reward_model(task: Task, tokenizer: Any, model: Any) -> Finished:
    labels = model.config.num_labels
    if labels != 1:
        raise _refused(f"the classifier has {labels} labels, and a reward model must have exactly 1 (its raw score)")
    pad = tokenizer.pad_token_id
    if pad is None or model.config.pad_token_id is None:
        raise _refused("the tokenizer or config.json has no pad token, so a padded batch has no last token to score")
    if pad in end_tokens(tokenizer, model.config):
        raise _refused(
            f"pad and eos are the same token ({pad}): transformers scores the token before eos and vLLM eos itself, so "
            "one reward model would give two scores. Give it a pad token of its own, resize, and train or save it again"
        )
    if pad != model.config.pad_token_id:
        raise _refused(f"the tokenizer pads with {pad} and config.json says pad_token_id {model.config.pad_token_id}")
    rows = encode_conversations(tokenizer, neutral_conversations())
    return Finished("reward_model", model, {}, Lineage(job_id=task.job_id), score_probes=score_probes(model, rows, pad))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _refused(reason: str) -> CheckpointRefused:
    return CheckpointRefused(reason, field="source")
