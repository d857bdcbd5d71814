"""The check every checkpoint passes before any engine reads it: whole, unchanged, of the right kind, and only data.

A checkpoint that was published never changes (`platform.store`), but a disk may lie and a folder may be filled by
hand: so nothing is loaded whose bytes are not those its manifest names.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

from services.contracts.checkpoints import MANIFEST_NAME, CheckpointKind, Manifest
from services.contracts.errors import CheckpointRefused, NotFound, StoreError
from services.platform.store import ArtifactStore, hash_file

DATA_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".md"})
"""What a checkpoint may hold: weights as safetensors, configuration, the tokenizer (`.model`: SentencePiece), words."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill"})
"""Formats that run code, or may, when they are read."""
CONFIG_NAMES = ("config.json", "tokenizer_config.json")
HASHES_KEPT = 4096
"""File hashes remembered by a process: some hundred checkpoints."""

_Stamp = tuple[int, int, int, int]
_hashes: OrderedDict[str, tuple[_Stamp, str]] = OrderedDict()
_hashes_lock = threading.Lock()


def verify_checkpoint(store: ArtifactStore, folder: str, kind: CheckpointKind) -> Manifest:
    """Check a checkpoint folder of the store before anything is loaded from it.

    It must have its manifest, be of the asked kind, hold exactly the files the manifest names with their sizes and
    SHA-256, hold safetensors weights and no pickle, program, link or stray file, and its config must name the
    manifest's architecture and ask for no custom code. Blocks while it hashes (about 1 GB/s): call it in a thread.
    A file is hashed again only when its path, inode, size, mtime or ctime changed. A remote store's folder is
    downloaded first; load from `store.local_folder(folder)`, which is what was checked.

    Args:
        store: The artifact store.
        folder: Path of the checkpoint folder in the store, e.g. `models/reward` or `runs/r/iter-1/checkpoint`.
        kind: `policy` or `reward_model`; what the caller is about to use it as.

    Raises:
        CheckpointRefused: with the file at fault and the remedy; its `field` is `checkpoint`.
    """
    try:
        manifest = store.manifest(folder)
        local = store.local_folder(folder)
    except NotFound as error:
        raise refusal(
            folder, f"it has no {MANIFEST_NAME}, which is written last, so it does not exist or is unfinished; train "
            "or import it (a job of kind import_model makes the manifest)"
        ) from error  # fmt: skip
    except StoreError as error:
        raise refusal(folder, error.detail) from error
    if manifest.kind != kind:
        raise refusal(folder, f"it is a {manifest.kind}, and a {kind} is needed here")
    _check_names(folder, local, manifest)
    for name, entry in manifest.files.items():
        _check_file(folder, local / name, name, entry.bytes, entry.sha256)
    _check_configs(folder, local, manifest)
    return manifest


def refusal(folder: str, reason: str) -> CheckpointRefused:
    """The error for a refused checkpoint. `reason` continues the sentence and ends with the remedy."""
    return CheckpointRefused(f"checkpoint {folder!r} is refused: {reason}", field="checkpoint")


def _check_names(folder: str, local: Path, manifest: Manifest) -> None:
    present = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_symlink() or not path.is_dir()}
    for name in sorted(present | set(manifest.files)):
        suffix = Path(name).suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise refusal(folder, f"{name} may be a pickle, which runs code when read; convert it to safetensors")
        if name == MANIFEST_NAME:
            continue
        if (local / name).is_symlink() or ".." in Path(name).parts or Path(name).is_absolute():
            raise refusal(folder, f"{name} is a link or leaves the folder; put the file itself there")
        if suffix not in DATA_SUFFIXES:
            allowed = ", ".join(sorted(DATA_SUFFIXES))
            raise refusal(folder, f"{name} is no file of a checkpoint ({allowed}); remove it, import the rest again")
        if name not in present:
            raise refusal(folder, f"{name} is in the manifest but not in the folder; restore it, or import it again")
        if name not in manifest.files:
            raise refusal(folder, f"{name} is in the folder but not in the manifest; remove it, or import it again")
    if not any(name.endswith(".safetensors") for name in manifest.files):
        raise refusal(folder, "it holds no .safetensors weights; convert them and import the model again")


def _check_file(folder: str, path: Path, name: str, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise refusal(
                folder, f"{name} has {found:,} bytes and the manifest says {size:,}; the file was changed or cut "
                "after it was published: restore it, or train or import the model again"
            )  # fmt: skip
        digest = _sha256(path)
    except OSError as error:
        raise refusal(folder, f"{name} cannot be read ({error.strerror or error}); mend disk or rights") from error
    if digest != sha256:
        raise refusal(
            folder, f"{name} has SHA-256 {digest[:16]}… and the manifest says {sha256[:16]}…; the file was changed "
            "after it was published: restore it, or train or import the model again"
        )  # fmt: skip


def _sha256(path: Path) -> str:
    status = path.stat()
    # ctime as well: mtime can be set back by whoever changes a file, ctime cannot
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    key = os.path.abspath(path)
    with _hashes_lock:
        known = _hashes.get(key)
    if known and known[0] == stamp:
        return known[1]
    digest = hash_file(path).sha256
    with _hashes_lock:
        _hashes[key] = (stamp, digest)
        _hashes.move_to_end(key)
        while len(_hashes) > HASHES_KEPT:
            _hashes.popitem(last=False)
    return digest


def _check_configs(folder: str, local: Path, manifest: Manifest) -> None:
    if "config.json" not in manifest.files:
        raise refusal(folder, "it has no config.json; import a complete Hugging Face folder")
    for name in CONFIG_NAMES:
        if name not in manifest.files:
            continue
        try:
            found: Any = json.loads((local / name).read_bytes())
        except ValueError as error:
            raise refusal(folder, f"{name} is not JSON ({error}); import the model again") from error
        if not isinstance(found, dict):
            raise refusal(folder, f"{name} is not a JSON object; import the model again")
        config = cast(dict[str, Any], found)
        if config.get("auto_map"):
            raise refusal(folder, f"{name} asks for custom code (auto_map), which is never run; use a built-in model")
        if name == "config.json":
            named = config.get("architectures") or [None]
            if named[0] != manifest.architecture:
                raise refusal(
                    folder, f"config.json says architecture {named[0]!r} and the manifest {manifest.architecture!r}; "
                    "import the model again"
                )  # fmt: skip
