"""Parquet files opened for random access, for reading many pages of one file."""

# pyarrow ships no types:
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from services.contracts.errors import StoreError
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore

log = get_logger(__name__)
pa: Any = pyarrow
pq: Any = pyarrow.parquet
Table = Any

BATCH_ROWS = 2048
"""Rows decoded at once, which bounds the memory that decoding takes."""

PAGE_ROWS = 256
"""Likewise while rows are looked for without a map: the first page decodes no more than these."""

FileKey = tuple[str, int, int]
"""Local path, modification time (ns) and size: published files never change, a folder put back by hand may."""


@dataclass
class OpenTable:
    """An open file.

    Parquet cannot be read from the middle, so a file that is asked for again is decoded into a memory map, in the
    background; until that is there, columns and rows are decoded as they are asked for. The map's pages are on disk and
    not on the heap: the system takes them back when it must.
    """

    key: FileKey
    path: str
    num_rows: int
    encoded_bytes: int
    mapping: Future[Table] | None = None

    @property
    def map(self) -> Table | None:
        """The whole file, once it is mapped."""
        mapping = self.mapping
        if mapping is None or not mapping.done() or mapping.cancelled() or mapping.exception() is not None:
            return None
        return mapping.result()

    @property
    def disk_bytes(self) -> int:
        """Disk its map takes; about that much while it is being written."""
        return self.encoded_bytes if self.map is None else self.map.nbytes

    def columns(self, names: Sequence[str]) -> Table:
        """Some columns, all rows. Raises StoreError."""
        return self.map.select(names) if self.map is not None else read_columns(Path(self.key[0]), self.path, names)

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows with these numbers, in this order. Raises StoreError."""
        found: dict[int, dict[str, Any]] = {}
        start, last = 0, max(numbers, default=-1)
        for batch in self._batches():
            if start > last:
                break
            here = [number for number in numbers if start <= number < start + batch.num_rows]
            if here:
                taken = batch.take(pa.array([number - start for number in here], pa.int64()))
                found.update(zip(here, taken.to_pylist(), strict=True))
            start += batch.num_rows
        return [found[number] for number in numbers]

    def _batches(self) -> Iterable[Any]:
        if self.map is not None:
            return self.map.to_batches()
        return _parquet(Path(self.key[0])).iter_batches(batch_size=PAGE_ROWS)


class OpenTables:
    """The files that were opened last.

    Args:
        max_bytes: Disk that their maps may take together; the one in use is kept whatever its size.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[FileKey, OpenTable] = OrderedDict()
        self._mapper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="table-mapper")

    def get(self, store: ArtifactStore, path: str) -> OpenTable:
        """A stored Parquet file, opened. Raises NotFound, StoreError."""
        file = store.local_file(path)
        stat = file.stat()
        key = (str(file), stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if key not in self._open:
                self._open[key] = _opened(key, file, path)
            elif self._open[key].mapping is None:
                self._open[key].mapping = self._mapper.submit(_mapped, store, file, path)
            self._open.move_to_end(key)
            while len(self._open) > 1 and sum(one.disk_bytes for one in self._open.values()) > self._max_bytes:
                _, dropped = self._open.popitem(last=False)
                if dropped.mapping is not None:
                    dropped.mapping.cancel()
            return self._open[key]


def _opened(key: FileKey, file: Path, path: str) -> OpenTable:
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is not a readable Parquet file: {error}") from error
    encoded = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return OpenTable(key, path, metadata.num_rows, encoded)


def _parquet(file: Path) -> Any:
    # Buffering whole column chunks ahead would read 20,000 rows for the first 50.
    return pq.ParquetFile(file, memory_map=True, pre_buffer=False)


def read_columns(file: Path, path: str, names: Sequence[str] | None) -> Table:
    """Columns of a Parquet file, all of them for None. Raises StoreError naming its store path."""
    try:
        return _parquet(file).read(columns=None if names is None else list(names))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StoreError(f"{path} is not a readable Parquet file: {error}") from error


def _mapped(store: ArtifactStore, file: Path, path: str) -> Table:
    """The file as an uncompressed Arrow file, mapped. It never has a name, so that nothing is left behind.

    It lies on the disk of a local store, else in the temporary folder: that one may be main memory, as in a container.
    """
    try:
        parquet = _parquet(file)
        with tempfile.TemporaryFile(dir=store.work_folder("tables")) as temporary:
            name = f"/proc/self/fd/{temporary.fileno()}"
            with pa.OSFile(name, "wb") as out, pa.ipc.new_file(out, parquet.schema_arrow) as writer:
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                    writer.write_batch(batch)
            return pa.ipc.open_file(pa.memory_map(name)).read_all()
    except Exception as error:
        log.warning(
            "table_not_mapped", path=path, store=store.url, error=f"{type(error).__name__}: {error}",
            effect="each page decodes the file again",
        )  # fmt: skip
        raise
