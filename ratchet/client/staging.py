"""Bringing a local Hugging Face folder into the store, so that a run or a training job can import it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

from services.contracts.checkpoints import MANIFEST_NAME
from services.contracts.errors import InvalidInput, StoreError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
IGNORED_FOLDERS = frozenset({".git", ".cache", "__pycache__"})
FICLONE = 0x40049409
"""ioctl of btrfs and XFS: a copy that shares its blocks until one side is written (linux/fs.h)."""
COPY_BYTES = 1 << 20


def check_model_folder(folder: Path, field: str = "model") -> None:
    """Refuse what cannot be a finished model, cheaply. Raises InvalidInput with the remedy."""
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", field=field)
    if not (folder / CONFIG).is_file():
        raise InvalidInput(
            f"{folder} has no {CONFIG}; a Hugging Face model folder (save_pretrained) has one", field=field
        )
    try:
        json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise InvalidInput(
            f"{folder / CONFIG} is not JSON ({error}); was it written to the end?", field=field
        ) from error
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        try:
            shards = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise InvalidInput(
                f"{folder / INDEX} is not an index of weights; was it written to the end?", field=field
            ) from error
        if missing := sorted(shards - set(weights)):
            raise InvalidInput(
                f"{folder} is half-written: {INDEX} names {len(shards)} files and {', '.join(missing[:3])} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Copy the folder again",
                field=field,
            )
    elif not weights:
        pickled = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        remedy = (
            f"it has {pickled[0]}, and pickle files are not loaded; convert it with save_pretrained(...)"
            if pickled
            else "is it a model folder, and was it written to the end?"
        )
        raise InvalidInput(f"{folder} has no *.safetensors; {remedy}", field=field)
    for name in weights:
        _check_header(folder / name, field)


def _check_header(file: Path, field: str) -> None:
    """A safetensors file states its own length: 8 bytes, the JSON header, the data up to the largest end offset."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidInput(f"{file} is not a safetensors file ({error}); copy it again", field=field) from error
    if size != expected:
        raise InvalidInput(
            f"{file} is cut off: it has {size:,} bytes, its header says {expected:,}. Copy it again", field=field
        )


def stage_model(folder: str | Path, store_url: str | None, field: str = "model") -> str:
    """Put a model folder into the store as `staging/{name}-{hash}`; returns that path.

    Files are copied (sharing blocks where the file system can), never hard-linked: whoever later writes into the folder
    in place would change what is published. The copy appears under its name only when it is complete. The same folder
    gives the same path, and is put there once.

    Raises:
        InvalidInput: the folder is not a finished model, or the store is not a local folder.
    """
    source = Path(folder).expanduser().resolve()
    check_model_folder(source, field)
    root = _local_root(store_url, source, field)
    files = _files(source)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip(".-_")[:60] or "model"
    path = f"staging/{name}-{_fingerprint(source, files)}"
    target = root / path
    if target.exists():
        return path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        for file in files:
            place = partial / file
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy(source / file, place)
        os.rename(partial, target)
    except OSError as error:
        if not target.exists():  # else another process was first, with the same content
            raise StoreError(f"{source} cannot be put into the store at {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _local_root(store_url: str | None, source: Path, field: str) -> Path:
    if store_url is None:
        raise InvalidInput(
            f"{source} is a local folder, and it is not known where the artifact store is. Set RATCHET_STORE_URL to "
            "the store's folder, or name a hub model or a store checkpoint (models/…)",
            field=field,
        )
    local = store_url.removeprefix("file://")
    if "://" in local:
        raise InvalidInput(
            f"{source} is a local folder, and the artifact store is {store_url}: only local stores take folders. "
            f"Copy it there yourself (e.g. 'aws s3 cp --recursive {source} {store_url}/staging/{source.name}') and "
            f"name staging/{source.name}, or name a hub model",
            field=field,
        )
    return Path(local)


def _files(source: Path) -> list[Path]:
    found = [file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file()]
    return [
        file
        for file in found
        if not IGNORED_FOLDERS & set(file.parts) and not file.name.startswith(".") and file.name != MANIFEST_NAME
    ]  # a manifest is of a store's own checkpoint; the import makes a new one


def _fingerprint(source: Path, files: list[Path]) -> str:
    """Content alone: the same model is the same folder in the store, however often it was copied or written anew."""
    digest = hashlib.sha256()
    for file in files:
        with (source / file).open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file}\0{content}\0".encode())
    return digest.hexdigest()[:12]


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        try:
            fcntl.ioctl(written, FICLONE, read.fileno())
        except OSError:  # another file system, or one without shared blocks
            shutil.copyfileobj(read, written, COPY_BYTES)
    shutil.copystat(source, target)
