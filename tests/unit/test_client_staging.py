"""A local model folder on its way into the store: unfinished ones are refused, finished ones appear whole."""

import json
import os
from pathlib import Path

import pytest

from ratchet.client.staging import stage_model
from services.contracts.errors import InvalidInput


def weights(file: Path, size: int = 16) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "My model!"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights(folder / "model.safetensors")
    return folder


def test_a_folder_is_staged_once_under_its_name_and_content(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    path = stage_model(model, str(store))
    assert path.startswith("staging/My-model-")
    assert stage_model(model, f"file://{store}") == path
    weights(model / "model.safetensors", 17)
    assert stage_model(model, str(store)) != path
    assert not [name for name in os.listdir(store / "staging") if name.startswith(".tmp")]


def test_writing_into_the_folder_afterwards_does_not_reach_the_store(model: Path, tmp_path: Path) -> None:
    staged = tmp_path / "store" / stage_model(model, str(tmp_path / "store"))
    before = {name: (staged / name).read_bytes() for name in ("config.json", "model.safetensors")}
    for name in before:
        with (model / name).open("r+b") as file:  # in place, as `cp` and `save_pretrained` do
            file.write(b"XX")
    assert {name: (staged / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "has no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "is not JSON"),
        (lambda m: (m / "model.safetensors").unlink(), "has no \\*.safetensors"),
        (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickle files are not loaded"),
        (lambda m: os.truncate(m / "model.safetensors", 70), "is cut off|not a safetensors"),
        (
            lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "half-written: .* model-2.safetensors is missing",
        ),
    ],
)
def test_an_unfinished_folder_is_refused(model: Path, tmp_path: Path, spoil: object, message: str) -> None:
    spoil(model)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InvalidInput, match=message):
        stage_model(model, str(tmp_path / "store"), "policy")


def test_a_remote_store_is_told_with_a_remedy(model: Path) -> None:
    with pytest.raises(InvalidInput, match="Copy it there yourself"):
        stage_model(model, "s3://bucket/x")
    with pytest.raises(InvalidInput, match="Set RATCHET_STORE_URL"):
        stage_model(model, None)


def test_the_same_content_is_the_same_folder_however_often_it_is_written(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("model", "again/model"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        weights(folder / "model.safetensors", 3 << 20)
        os.utime(folder / "model.safetensors", (len(name), len(name)))
    assert stage_model(tmp_path / "model", str(store)) == stage_model(tmp_path / "again/model", str(store))
