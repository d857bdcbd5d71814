"""Our subclass of DPOTrainer against the stock one, one test per override; and the checks of imported models."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from services.contracts.errors import CheckpointRefused, InvalidInput, RatchetError
from services.contracts.training import DpoJob, ImportModelJob, SftJob
from services.platform.store import ArtifactStore
from services.trainer.checkpoints import config_hash, load_model, load_tokenizer, tokenizer_hash
from services.trainer.imports import run_import
from services.trainer.reference import ReferenceLogprobs, reference_logprobs
from services.trainer.task import Task
from services.trainer.workspace import Workspace
from tests.fixtures.trainer import config, make_pairs, put_jsonl, put_pairs, sft_rows, write_model

PAIRS = make_pairs(24)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Start and reference."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "start", seed=1), write_model(folder / "reference", seed=2)


def task(root: Path) -> Task:
    store = ArtifactStore(str(root))
    return Task("x", store, Workspace(store.work_folder("train/x")), lambda progress: None, time.monotonic())


def dpo_job(**changes: Any) -> DpoJob:
    return DpoJob.model_validate(
        {
            "start": "models/a", "reference": "models/b", "pairs": ["p.parquet"], "output": "models/c",
            "config": config(learning_rate=1e-4, warmup_fraction=0.0, **changes),
        }
    )  # fmt: skip


def ours(root: Path, models: tuple[Path, Path], **changes: Any) -> Any:
    from services.trainer.dpo import make_trainer

    work = task(root)
    logprobs, _ = reference_logprobs(work.store, "reference.parquet", PAIRS, models[1], bf16=False)
    start = load_model(models[0], "policy")
    return make_trainer(work, dpo_job(**changes), start, load_tokenizer(models[0]), PAIRS, logprobs)


def stock(root: Path, models: tuple[Path, Path], **changes: Any) -> Any:
    """DPOTrainer with an explicit reference model. Token ids need its preparation out of the way, nothing else."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from services.trainer.loop import trl_arguments

    class Stock(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    job = dpo_job(**changes)
    return Stock(
        model=load_model(models[0], "policy"),
        ref_model=load_model(models[1], "policy"),
        args=DPOConfig(
            **trl_arguments(job.config, Workspace(root / "stock")),
            beta=job.config.beta,
            max_length=job.config.max_length,
        ),
        train_dataset=Dataset.from_dict(
            {
                "prompt_ids": [list(pair.prompt_ids) for pair in PAIRS],
                "chosen_ids": [list(pair.chosen_ids) for pair in PAIRS],
                "rejected_ids": [list(pair.rejected_ids) for pair in PAIRS],
            }
        ),
        processing_class=load_tokenizer(models[0]),
    )


def batches(trainer: Any, order: list[int]) -> Any:
    for begin in range(0, len(order), 8):
        yield trainer.data_collator([trainer.train_dataset[i] for i in order[begin : begin + 8]])


def same_order(*trainers: Any) -> None:
    """The order of 8 pairs a batch, whatever the micro batch."""
    from services.trainer.loop import LengthGrouped

    lengths = [len(pair.prompt_ids) + len(pair.rejected_ids) for pair in PAIRS]
    for trainer in trainers:
        sampler = LengthGrouped(lengths, 8, 0, trainer)
        trainer._get_train_sampler = lambda *args, found=sampler, **kwargs: found


def test_precomputed_reference_gives_the_losses_of_an_explicit_reference_model(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    import torch

    mine, theirs = ours(tmp_path, models), stock(tmp_path, models)
    order = list(range(len(PAIRS)))
    with torch.no_grad():
        left = [mine.compute_loss(mine.model, batch).item() for batch in batches(mine, order)]
        right = [theirs.compute_loss(theirs.model, batch).item() for batch in batches(theirs, order)]
    assert left == pytest.approx(right, abs=1e-5)
    assert mine.ref_model is None
    assert len(set(left)) == len(left)


def test_the_whole_training_equals_stock_given_the_same_order(tmp_path: Path, models: tuple[Path, Path]) -> None:
    mine, theirs = ours(tmp_path, models), stock(tmp_path, models)
    same_order(mine, theirs)
    left, right = (trainer.train().training_loss for trainer in (mine, theirs))
    assert left == pytest.approx(right, abs=1e-5)
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        assert (a - b).abs().max().item() < 1e-5


def test_the_rows_reach_the_model_as_they_are(tmp_path: Path, models: tuple[Path, Path]) -> None:
    trainer = ours(tmp_path, models)
    (batch, *_) = batches(trainer, [0])
    pair = PAIRS[0]
    for row, side in enumerate((pair.chosen_ids, pair.rejected_ids)):
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == [*pair.prompt_ids, *side]
        assert int(batch["completion_mask"][row].sum()) == len(side)


def test_micro_batches_give_the_loss_of_the_whole_batch(tmp_path: Path, models: tuple[Path, Path]) -> None:
    whole = ours(tmp_path / "a", models)
    parts = ours(tmp_path / "b", models, micro_batch_size=2)
    same_order(whole, parts)
    left, right = (trainer.train().training_loss for trainer in (whole, parts))
    assert left == pytest.approx(right, abs=1e-4)


def test_reference_logprobs_are_computed_once(tmp_path: Path, models: tuple[Path, Path]) -> None:
    store = ArtifactStore(str(tmp_path))
    first, computed = reference_logprobs(store, "r.parquet", PAIRS, models[1], bf16=False)
    again, computed_again = reference_logprobs(store, "r.parquet", PAIRS, Path("/nowhere"), bf16=False)
    assert (computed, computed_again) == (True, False)
    assert first == again
    assert isinstance(first, ReferenceLogprobs)
    with pytest.raises(RatchetError, match="24 pairs, 23 are needed"):
        reference_logprobs(store, "r.parquet", PAIRS[:-1], Path("/nowhere"), bf16=False)


def test_hashes_tell_shape_and_tokenizer_and_nothing_else(tmp_path: Path, models: tuple[Path, Path]) -> None:
    from transformers import AutoConfig

    start, reference = (AutoConfig.from_pretrained(folder) for folder in models)
    assert config_hash(start) == config_hash(reference)
    start.pad_token_id, start.use_cache = 3, False
    assert config_hash(start) == config_hash(reference)
    start.rms_norm_eps = 1e-3
    assert config_hash(start) != config_hash(reference)
    tokenizer = load_tokenizer(models[0])
    before = tokenizer_hash(tokenizer)
    assert before == tokenizer_hash(load_tokenizer(models[1]))
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(load_tokenizer(tmp_path / "again")) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) != before


def test_pairs_of_another_tokenizer_are_refused(models: tuple[Path, Path]) -> None:
    from services.trainer.dpo import check_token_ids

    tokenizer = load_tokenizer(models[0])
    check_token_ids(PAIRS, tokenizer)
    beyond = PAIRS[0].model_copy(update={"chosen_ids": (1, 100_000)})
    with pytest.raises(InvalidInput, match="token id 100000"):
        check_token_ids([beyond], tokenizer)
    shifted = [p.model_copy(update={"chosen_ids": tuple(i - 1 for i in p.chosen_ids)}) for p in PAIRS]
    with pytest.raises(InvalidInput, match="do not decode to their text"):
        check_token_ids(shifted, tokenizer)


SFT = {"kind": "sft", "start": "models/a", "data": "sft.jsonl", "config": config(), "output": "models/c"}
DPO = {
    "kind": "dpo", "start": "models/a", "reference": "models/b", "pairs": ["pairs.parquet"], "config": config(),
    "output": "models/c",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two policies of different tokenizers, and data."""
    root = tmp_path_factory.mktemp("store")
    write_model(root / "staging" / "a")
    tokenizer = json.loads((write_model(root / "staging" / "b") / "tokenizer_config.json").read_text())
    (root / "staging" / "b" / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"unk_token": "<pad>"}))
    for name in ("a", "b"):
        job = ImportModelJob(model_kind="policy", source=f"store:staging/{name}", output=f"models/{name}")
        run_import(task(root), job)
    store = ArtifactStore(str(root))
    put_jsonl(store, "sft.jsonl", sft_rows(8))
    put_pairs(store, "pairs.parquet", PAIRS)
    return root


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (DPO, "different tokenizers"),
        (SFT | {"config": config(max_length=4)}, "too short for every one"),
        (SFT | {"config": config(max_length=100_000)}, "256 positions"),
        (SFT | {"start": "models/none"}, "MANIFEST.json"),
        (SFT | {"data": "none.jsonl"}, "none.jsonl is not in the artifact store"),
    ],
)
def test_a_job_that_cannot_work_is_refused_before_it_trains(root: Path, request_: dict[str, Any], words: str) -> None:
    from services.trainer.dpo import run_dpo
    from services.trainer.sft import run_sft

    def run() -> None:
        if request_["kind"] == "sft":
            run_sft(task(root), SftJob.model_validate(request_))
        else:
            run_dpo(task(root), DpoJob.model_validate(request_))

    with pytest.raises(RatchetError, match=words):
        run()
    assert not (root / "models" / "c").exists()


def spoil_half_written(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1000)


def spoil_no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent.parent / "outside.safetensors")


def spoil_code(folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"auto_map": {"AutoModel": "x.Y"}}))


def spoil_layers(folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"num_hidden_layers": 3, "layer_types": None}))


def spoil_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_half_written, "half-written"),
        (spoil_no_template, "no chat template"),
        (spoil_pickle, "only pickle weights"),
        (spoil_no_weights, "has no weights"),
        (spoil_shards, "1 of 2 shards"),
        (spoil_link, "link that leaves"),
        (spoil_code, "custom code"),
        (spoil_layers, "weights lack"),
        (spoil_tokenizer, "tokenizer is missing"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, spoil: Any, words: str) -> None:
    spoil(write_model(tmp_path / "staging" / "m"))
    job = ImportModelJob(model_kind="policy", source="store:staging/m", output="models/m")
    with pytest.raises(CheckpointRefused, match=words):
        run_import(task(tmp_path), job)
    assert not (tmp_path / "models").exists()


def test_a_reward_model_needs_one_label_and_its_own_pad_token(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    source = write_model(tmp_path / "staging" / "base")
    for name, labels, pad in (("two", 2, 0), ("eos", 1, 2), ("good", 1, 0)):
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels, pad_token_id=pad)
        model.save_pretrained(tmp_path / "staging" / name)
        tokenizer = load_tokenizer(source)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.save_pretrained(tmp_path / "staging" / name)

    def run(name: str) -> Any:
        job = ImportModelJob(model_kind="reward_model", source=f"store:staging/{name}", output=f"models/{name}")
        return run_import(task(tmp_path), job)

    with pytest.raises(CheckpointRefused, match="2 labels"):
        run("two")
    with pytest.raises(CheckpointRefused, match="pad and eos are the same"):
        run("eos")
    with pytest.raises(CheckpointRefused, match="LlamaForCausalLM, and a reward_model"):
        run("base")
    assert run("good").version == "models/good"
    assert len(ArtifactStore(str(tmp_path)).manifest("models/good").score_probes) == 4


def test_a_reward_model_starts_with_a_random_head_on_a_body_that_is_not(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "base")
    assert load_model(folder, "reward_model", num_labels=1).config.num_labels == 1
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layers.0" in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match=lost):
        load_model(folder, "reward_model", num_labels=1)


def test_a_pad_token_that_ends_texts_by_the_config_is_replaced_before_training(tmp_path: Path) -> None:
    from services.trainer.reward_model import PAD_TOKEN, _scorer

    folder = write_model(tmp_path / "base")
    tokenizer: Any = load_tokenizer(folder)
    found = json.loads((folder / "config.json").read_text())
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (folder / "config.json").write_text(json.dumps(found | {"eos_token_id": ends}))
    model = _scorer(folder, "policy", tokenizer, 0)
    assert tokenizer.pad_token == PAD_TOKEN
    assert model.config.pad_token_id not in ends


def test_the_hub_is_used_only_when_allowed(tmp_path: Path) -> None:
    job = ImportModelJob(model_kind="policy", source="hub:owner/name", output="models/m")
    with pytest.raises(InvalidInput, match="RATCHET_TRAINER_ALLOW_HUB"):
        run_import(task(tmp_path), job)
    with pytest.raises(InvalidInput, match="neither"):
        run_import(task(tmp_path), job.model_copy(update={"source": "/etc"}))
