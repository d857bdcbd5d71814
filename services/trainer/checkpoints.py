"""Checkpoint folders: safetensors only, hashes that say what may be swapped for what, and the manifest written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from services.contracts.checkpoints import MANIFEST_NAME, CheckpointKind, Lineage, LogprobProbe, Manifest, ScoreProbe
from services.contracts.errors import CheckpointRefused
from services.contracts.training import TrainingResult
from services.platform.store import hash_file
from services.trainer.published import JOB_NAME, RESULT_NAME
from services.trainer.workspace import canonical

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "safetensors", "tokenizers")
SHAPELESS_KEYS = frozenset(
    {
        "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
        "pad_token_id", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
        "output_hidden_states", "tags", "_attn_implementation_autoset", "chunk_size_feed_forward",
    }
)  # fmt: skip
"""Of config.json: what does not change which weights fit or what they compute."""
HEADS = ("score.", "classifier.")
"""Where transformers' sequence classifiers keep the head that a policy has not."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def config_hash(config: PretrainedConfig) -> str:
    """SHA-256 of the shape-giving part of a configuration. Equal for checkpoints that can be swapped in place."""
    found = {key: value for key, value in config.to_dict().items() if key not in SHAPELESS_KEYS}
    return _hash(found)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary, rules, special tokens and chat template: equal ids mean equal text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    return _hash(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "rules": {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "decoder", "model")},
            "special": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
            "chat_template": tokenizer.chat_template,
        }
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint folder, without custom code and without the hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def load_model(folder: Path, kind: CheckpointKind, *, num_labels: int | None = None) -> PreTrainedModel:
    """A model in fp32: training keeps fp32 weights, and probes are computed in fp32.

    Raises:
        CheckpointRefused: the weights lack tensors the architecture needs (a head would be random), or do not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    extra: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        model, info = auto.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True, **extra,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckpointRefused(f"{folder.name}: the model does not load: {str(error).strip()[:500]}") from error
    # A new head is random by intent; the body under it never is.
    missing = sorted(key for key in info["missing_keys"] if num_labels is None or not key.startswith(HEADS))
    if missing:
        raise CheckpointRefused(
            f"{folder.name}: the weights lack {len(missing)} tensors that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); they would be random. Import whole weights"
        )
    return model.eval()


def save_weights(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Save as safetensors in the dtype the checkpoint is stored in (the model is converted in place)."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype))
    model.save_pretrained(str(folder))


def copy_description(start: Path, folder: Path) -> None:
    """Take everything but the weights from the checkpoint training started from, so that nothing of it drifts."""
    ours = {MANIFEST_NAME, RESULT_NAME, JOB_NAME}
    for file in start.iterdir():
        if file.is_file() and file.name not in ours and not is_weights(file.name):
            shutil.copyfile(file, folder / file.name)


def is_weights(name: str) -> bool:
    """Weights and their index."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def stored_dtype(folder: Path) -> str:
    """dtype of most of the stored weights, from the safetensors headers alone."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors_header(file).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
    found = max(sizes, key=lambda key: sizes[key]) if sizes else "F32"
    if found not in _DTYPES:
        raise CheckpointRefused(
            f"{folder.name}: weights of dtype {found} are not supported; allowed: {sorted(_DTYPES)}"
        )
    return _DTYPES[found]


def safetensors_header(file: Path) -> dict[str, Any]:
    """Header of a safetensors file, checked against the file's length.

    Raises:
        CheckpointRefused: the file is cut short or is no safetensors file.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size, 100_000_000):
                raise ValueError("the header does not fit into the file")
            header: dict[str, Any] = json.loads(handle.read(length))
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointRefused(
            f"{file.name} is half-written or no safetensors file ({error}); copy or download it again", field="source"
        ) from error
    if size != 8 + length + end:
        raise CheckpointRefused(
            f"{file.name} is half-written: its header announces {8 + length + end:,} bytes and it has {size:,}; "
            "copy or download it again",
            field="source",
        )
    return header


def weights_hash(manifest: Manifest) -> str:
    """SHA-256 over the hashes of a checkpoint's weight files."""
    return _hash(sorted((name, entry.sha256) for name, entry in manifest.files.items() if is_weights(name)))


def write_manifest(
    folder: Path,
    *,
    kind: CheckpointKind,
    model: PreTrainedModel,
    result: TrainingResult,
    job: BaseModel,
    lineage: Lineage,
    logprob_probes: tuple[LogprobProbe, ...] = (),
    score_probes: tuple[ScoreProbe, ...] = (),
) -> Manifest:
    """Finish a checkpoint folder: result and job beside the weights, then the manifest over all of it.

    Args:
        model: The saved weights, loaded again from `folder`.
    """
    (folder / RESULT_NAME).write_text(result.model_dump_json(indent=2) + "\n")
    (folder / JOB_NAME).write_text(canonical(job) + "\n")
    config = json.loads((folder / "config.json").read_text())
    manifest = Manifest(
        kind=kind,
        version=result.version,
        architecture=config["architectures"][0],
        config_hash=config_hash(model.config),
        tokenizer_hash=tokenizer_hash(load_tokenizer(folder)),
        dtype=stored_dtype(folder),
        parameters=model.num_parameters(),
        tied_embeddings=bool(model.config.get_text_config().tie_word_embeddings) and kind == "policy",
        files={
            str(file.relative_to(folder)): hash_file(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != MANIFEST_NAME
        },
        logprob_probes=logprob_probes,
        score_probes=score_probes,
        metrics=result.metrics,
        lineage=lineage,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        libraries={name: library_version(name) for name in LIBRARIES},
    )
    with open(folder / MANIFEST_NAME, "w") as handle:
        handle.write(manifest.model_dump_json(indent=2) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    return manifest


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str, separators=(",", ":")).encode()).hexdigest()
