"""The artifact store: complete or absent, first writer wins, nothing outside."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from services.contracts.checkpoints import MANIFEST_NAME, Lineage, Manifest
from services.contracts.conversations import Message, Prompt
from services.contracts.errors import NotFound, StoreError
from services.platform.store import ArtifactStore, hash_file
from services.platform.tables import from_parquet, publish_rows, read_metadata, read_rows, to_parquet


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def manifest(version: str) -> Manifest:
    return Manifest(
        kind="policy", version=version, architecture="LlamaForCausalLM", config_hash="c", tokenizer_hash="t",
        dtype="float32", parameters=1, tied_embeddings=False, files={}, lineage=Lineage(job_id="j"), created_at="now",
    )  # fmt: skip


def test_a_published_file_never_changes(store: ArtifactStore) -> None:
    assert store.publish_bytes("runs/r/a.json", b"first") is True
    assert store.publish_bytes("runs/r/a.json", b"second") is False
    assert store.read_bytes("runs/r/a.json") == b"first"


def test_of_many_racing_writers_exactly_one_wins_and_readers_see_it_whole(store: ArtifactStore) -> None:
    wins: list[int] = []
    start = threading.Barrier(8)

    def write(index: int) -> None:
        start.wait()
        if store.publish_bytes("race.bin", bytes([index]) * 100_000):
            wins.append(index)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.read_bytes("race.bin") == bytes([wins[0]]) * 100_000


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../b", "a//b", "s3://b/x", ".hidden", "a/.tmp-x", "", "a\x00b"]
)
def test_a_path_outside_the_store_is_refused(store: ArtifactStore, path: str) -> None:
    with pytest.raises(StoreError, match="not a path in the artifact store"):
        store.read_bytes(path)
    with pytest.raises(StoreError):
        store.publish_bytes(path, b"x")


def test_a_link_that_leaves_the_store_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    os.symlink(tmp_path, tmp_path / "store" / "out")
    with pytest.raises(StoreError, match="leaves the artifact store"):
        store.read_bytes("out/secret")


def test_temporary_files_are_never_listed(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish_bytes("runs/r/a", b"x")
    (tmp_path / "store/runs/r/.tmp-b-123").write_bytes(b"half")
    assert store.list("runs/r") == ["a"]
    assert store.list("runs/absent") == []


def test_a_folder_without_manifest_does_not_exist(store: ArtifactStore) -> None:
    with store.scratch_folder() as folder, pytest.raises(StoreError, match=MANIFEST_NAME):
        store.publish_folder(folder, "models/half")
    with pytest.raises(NotFound):
        store.manifest("models/half")


def test_the_second_of_two_folders_is_given_up_and_the_first_stays(store: ArtifactStore) -> None:
    for number, expected in ((1, True), (2, False)):
        with store.scratch_folder() as scratch:
            folder = scratch / "out"
            folder.mkdir()
            (folder / "w").write_text(str(number))
            (folder / MANIFEST_NAME).write_text(manifest(f"v{number}").model_dump_json())
            assert store.publish_folder(folder, "models/m") is expected
    assert store.manifest("models/m").version == "v1"
    assert (store.local_folder("models/m") / "w").read_text() == "1"


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    (tmp_path / "store").rmdir()
    (tmp_path / "store").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="cannot be written"):
        store.check()


def test_a_damaged_json_is_named(store: ArtifactStore) -> None:
    store.publish_bytes("models/m/MANIFEST.json", b"{")
    with pytest.raises(StoreError, match=r"models/m/MANIFEST\.json is not a valid Manifest"):
        store.manifest("models/m")


def test_rows_come_back_as_they_were_and_the_same_rows_give_the_same_bytes(store: ArtifactStore) -> None:
    rows = [Prompt.of((Message(role="user", content=f"question {i} é"),)) for i in range(5)]
    assert publish_rows(store, "runs/r/p.parquet", rows, Prompt, {"seed": "7"})
    assert read_rows(store, "runs/r/p.parquet", Prompt) == rows
    assert read_metadata(store.read_bytes("runs/r/p.parquet")) == {"seed": "7"}
    assert to_parquet(rows, Prompt) == to_parquet(rows, Prompt)
    assert from_parquet(to_parquet([], Prompt), Prompt) == []


def test_a_damaged_table_is_named(store: ArtifactStore) -> None:
    store.publish_bytes("runs/r/p.parquet", b"PAR1 but not really")
    with pytest.raises(StoreError, match=r"runs/r/p\.parquet is not a readable table of Prompt"):
        read_rows(store, "runs/r/p.parquet", Prompt)


def test_a_file_hash_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    entry = hash_file(tmp_path / "f")
    assert entry.bytes == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_store_works_on_other_fsspec_filesystems() -> None:
    store = ArtifactStore("memory://ratchet-test")
    assert store.publish_bytes("a/b", b"1") is True
    assert store.publish_bytes("a/b", b"2") is False
    assert store.read_bytes("a/b") == b"1"
    assert store.list("a") == ["b"]
    store.check()


def test_in_an_object_store_the_second_of_two_racing_writers_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore("memory://race")
    assert store.publish_bytes("a.bin", b"first") is True
    looks: list[str] = []

    def exists(path: str, **_: object) -> bool:
        looks.append(path)
        return len(looks) > 1  # our look came before the first writer's write; the store itself knows better

    monkeypatch.setattr(store._fs, "exists", exists)
    assert store.publish_bytes("a.bin", b"second") is False
    assert len(looks) == 2
    assert store.read_bytes("a.bin") == b"first"


def test_a_store_without_its_library_is_named() -> None:
    with pytest.raises(StoreError, match="nosuch://b/p"):
        ArtifactStore("nosuch://b/p")


def test_a_folder_that_cannot_be_listed_is_named(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store._fs, "ls", refuse)
    with pytest.raises(StoreError, match="runs cannot be listed"):
        store.list("runs")
