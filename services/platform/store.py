"""The artifact store: an fsspec folder in which everything published is complete, and never changes.

A file is written under a temporary name and renamed; a folder counts only once its manifest is there. Publishing is
*first writer wins*: when two attempts of one job race, the second finds the first's complete result and adopts it.
In an object store a file (and a folder's manifest) is created by one conditional write; the other files of a folder
are not, so two trainings that finish at once could mix there: the manifest's hashes show it, and it is refused.
"""

# fsspec ships no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec
from pydantic import BaseModel, ValidationError

from services.contracts.checkpoints import MANIFEST_NAME, FileEntry, Manifest
from services.contracts.errors import NotFound, StoreError
from services.contracts.layout import manifest_file

Body = TypeVar("Body", bound=BaseModel)
HASH_BLOCK_BYTES = 1 << 20
PATH_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class ArtifactStore:
    """Reads and publishes artifacts by paths relative to the store's root.

    Args:
        url: A folder, or an fsspec URL (`s3://bucket/prefix`, `memory://x` in tests).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"the artifact store {url!r} cannot be opened: {error}", field="store_url") from error
        self._fs = filesystem
        self._root = root.rstrip("/")
        self.is_local = "file" in (
            filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
        )
        if self.is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Write, read and delete a small file. Raises StoreError saying what is wrong (full, read-only, missing)."""
        probe = f"{self._root}/.probe-{uuid.uuid4().hex}"
        try:
            self._fs.pipe_file(probe, b"ok")
            self._fs.rm_file(probe)
        except OSError as error:
            raise StoreError(f"the artifact store {self.url} cannot be written: {error}") from error

    def _full(self, path: str) -> str:
        if not PATH_PATTERN.fullmatch(path):
            raise StoreError(
                f"{path!r} is not a path in the artifact store: relative, of letters, digits, '.', '_', '-'; no '..'",
                field="path",
            )
        full = f"{self._root}/{path}"
        if self.is_local and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(self._root)):
            raise StoreError(f"{path!r} leaves the artifact store through a link", field="path")
        return full

    def exists(self, path: str) -> bool:
        """Whether a file (or folder) is there."""
        full = self._full(path)
        try:
            return bool(self._fs.exists(full))
        except OSError as error:
            raise StoreError(f"{path} cannot be looked for in {self.url}: {error}") from error

    def read_bytes(self, path: str) -> bytes:
        """A file's bytes. Raises NotFound."""
        try:
            return self._fs.cat_file(self._full(path))
        except FileNotFoundError as error:
            raise NotFound(f"{path} is not in the artifact store {self.url}") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read from {self.url}: {error}") from error

    def read_model(self, path: str, model: type[Body]) -> Body:
        """A JSON file as its contract. Raises NotFound, or StoreError when the file is not what it should be."""
        try:
            return model.model_validate_json(self.read_bytes(path))
        except ValidationError as error:
            raise StoreError(f"{path} is not a valid {model.__name__}: {error.errors()[0]['msg']}") from error

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted; temporary names are left out. An absent folder is empty."""
        try:
            entries = self._fs.ls(self._full(folder), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"{folder} cannot be listed in {self.url}: {error}") from error
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries]
        return sorted(name for name in names if PATH_PATTERN.fullmatch(name))

    def publish_bytes(self, path: str, data: bytes) -> bool:
        """Publish a file once and for all. Returns False when it was there already (and is left as it is)."""
        return self._write(path, data, replace=False)

    def publish_model(self, path: str, value: BaseModel) -> bool:
        """`publish_bytes` of a contract as indented JSON."""
        return self.publish_bytes(path, _json(value))

    def replace_model(self, path: str, value: BaseModel) -> None:
        """Replace a mutable JSON file atomically (only `control.json` and the like; results are published)."""
        self._write(path, _json(value), replace=True)

    def _write(self, path: str, data: bytes, *, replace: bool) -> bool:
        full = self._full(path)
        try:
            if not self.is_local:
                return self._put(full, data, replace=replace)
            parent, name = os.path.split(full)
            os.makedirs(parent, exist_ok=True)
            temporary = f"{parent}/.tmp-{name}-{uuid.uuid4().hex[:8]}"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if replace:
                    os.replace(temporary, full)
                else:
                    os.link(temporary, full)
                _sync_folder(parent)
                return True
            except FileExistsError:
                return False
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
        except OSError as error:
            raise StoreError(f"{path} cannot be written to {self.url}: {error.strerror or error}") from error

    def _put(self, full: str, data: bytes, *, replace: bool) -> bool:
        """Write to an object store. `create` is one conditional request there (S3: If-None-Match)."""
        if replace:
            self._fs.pipe_file(full, data)
            return True
        if self._fs.exists(full):
            return False
        try:
            self._fs.pipe_file(full, data, mode="create")
        except FileExistsError:
            return False
        return True

    @contextmanager
    def scratch_folder(self) -> Generator[Path]:
        """A temporary local folder, on the store's own disk when the store is local, removed afterwards."""
        parent = f"{self._root}/.scratch" if self.is_local else None
        if parent:
            os.makedirs(parent, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="r-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def work_folder(self, name: str, default: Path | None = None) -> Path:
        """A local folder that outlives its process: resumable state of long work. Readers of the store never see it.

        Args:
            name: One or more path segments, e.g. `train/r_iter-1-0a1b`.
            default: Its parent when the store is remote; a local store has it on its own disk, so that a finished
                folder can be moved into place by `publish_folder`.
        """
        if not PATH_PATTERN.fullmatch(name):
            raise StoreError(f"{name!r} is not a name of a work folder", field="path")
        elsewhere = default or Path(tempfile.gettempdir()) / "ratchet-work"
        parent = Path(self._root) / ".work" if self.is_local else elsewhere
        folder = parent / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def staged_folder(self, folder: str) -> Path:
        """A folder that somebody put into the store and that has no manifest yet, as a local path; remote: downloaded.

        Raises:
            NotFound: it is not there, or not a folder.
        """
        full = self._full(folder)
        if not self._fs.isdir(full):
            raise NotFound(f"{folder} is not a folder in the artifact store {self.url}")
        if self.is_local:
            return Path(full)
        local = Path(tempfile.mkdtemp(prefix="ratchet-staged-")) / "folder"
        self._fs.get(full, str(local), recursive=True)
        return local

    def publish_folder(self, local: Path, path: str) -> bool:
        """Publish a finished local folder (with its MANIFEST.json) as `path`. First writer wins; `local` is moved.

        Raises:
            StoreError: no manifest in `local`, or the store cannot be written.
        """
        if not (local / MANIFEST_NAME).is_file():
            raise StoreError(f"{path}: a folder without {MANIFEST_NAME} is not published")
        full = self._full(path)
        try:
            if self.is_local:
                for file in local.rglob("*"):
                    if file.is_file():
                        with open(file, "rb") as handle:
                            os.fsync(handle.fileno())
                os.makedirs(os.path.dirname(full), exist_ok=True)
                try:
                    os.rename(local, full)
                except OSError:
                    if self.exists(manifest_file(path)):
                        return False
                    raise
                _sync_folder(os.path.dirname(full))
                return True
            if self.exists(manifest_file(path)):
                return False
            for file in sorted(local.rglob("*")):
                if file.is_file() and file.name != MANIFEST_NAME:
                    self._fs.put_file(str(file), f"{full}/{file.relative_to(local)}")
            return self._put(f"{full}/{MANIFEST_NAME}", (local / MANIFEST_NAME).read_bytes(), replace=False)
        except OSError as error:
            raise StoreError(f"{path} cannot be written to {self.url}: {error.strerror or error}") from error

    def manifest(self, folder: str) -> Manifest:
        """Manifest of a checkpoint folder. Raises NotFound: without it the folder does not exist."""
        return self.read_model(manifest_file(folder), Manifest)

    def local_folder(self, folder: str) -> Path:
        """A checkpoint folder as a local path; a remote store's folder is downloaded once to a cache."""
        manifest = self.manifest(folder)
        if self.is_local:
            return Path(self._full(folder))
        cache = Path(tempfile.gettempdir()) / "ratchet-store-cache" / hashlib.sha256(
            f"{self.url}/{folder}/{manifest.model_dump_json()}".encode()
        ).hexdigest()[:24]  # fmt: skip
        if not (cache / MANIFEST_NAME).exists():
            partial = cache.with_name(f"{cache.name}.{uuid.uuid4().hex[:8]}")
            self._fs.get(self._full(folder), str(partial), recursive=True)
            try:
                os.rename(partial, cache)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
        return cache

    def local_file(self, path: str) -> Path:
        """A file as a local path; a remote store's file is downloaded to a cache."""
        full = self._full(path)
        if self.is_local:
            if not Path(full).is_file():
                raise NotFound(f"{path} is not in the artifact store {self.url}")
            return Path(full)
        cache = (
            Path(tempfile.gettempdir()) / "ratchet-store-cache" / hashlib.sha256(full.encode()).hexdigest()[:24] / path
        )
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = cache.with_name(f".{cache.name}.{uuid.uuid4().hex[:8]}")
            partial.write_bytes(self.read_bytes(path))
            os.replace(partial, cache)
        return cache

    def sha256(self, path: str) -> str:
        """Hash of a stored file."""
        return hashlib.sha256(self.read_bytes(path)).hexdigest()


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)


def _json(value: BaseModel) -> bytes:
    return json.dumps(value.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
