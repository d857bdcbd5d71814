"""Pairs to look through: filtered, sorted and paged, and one pair among the responses it was chosen from.

Blocks on I/O: call it in a thread. Whole columns are only compared; contracts are made of no rows but the page's.
"""

# pyarrow ships no types:
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Literal, TypeVar

import pyarrow
import pyarrow.compute

from services.contracts import layout
from services.contracts.browsing import JudgedResponse, PairDetail, PairPage, PairQuery
from services.contracts.errors import InvalidInput, NotFound, StoreError
from services.contracts.pairs import Pair
from services.contracts.rollouts import Rollout
from services.contracts.runs import RunRecord
from services.orchestrator.open_tables import FileKey, OpenTable, OpenTables, read_columns
from services.platform.store import ArtifactStore

MAX_TABLE_BYTES = 1 << 29
"""Disk (of a local store) for opened pair files; 20,000 pairs of a chat model are about 120 MB."""
MAX_FINDINGS = 64
"""Queries whose row numbers are remembered, so that turning a page compares nothing; 160 kB for 20,000 pairs."""
MAX_PLACES = 8
"""Iterations whose places of prompts (which chunk) are remembered."""
TEXTS = ("prompt", "chosen", "rejected")
LENGTHS = {"chosen_tokens": "chosen_ids", "rejected_tokens": "rejected_ids"}

pa: Any = pyarrow
pc: Any = pyarrow.compute
Column = Any
"""An Arrow array, in chunks or whole."""
Value = TypeVar("Value")


class _Recent(Generic[Value]):
    """The values that were asked for last, made when they are not among them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


_tables = OpenTables(MAX_TABLE_BYTES)
_findings: _Recent[Column] = _Recent(MAX_FINDINGS)
_places: _Recent[dict[str, int]] = _Recent(MAX_PLACES)


def pair_page(store: ArtifactStore, run: str, iteration: int, query: PairQuery, offset: int, limit: int) -> PairPage:
    """`limit` of the pairs that a query finds, from the `offset`th on.

    Raises:
        NotFound: before the iteration's pairs are made.
        InvalidInput: a range of margins that holds none.
    """
    if query.min_margin is not None and query.max_margin is not None and query.min_margin > query.max_margin:
        raise InvalidInput(
            f"min_margin ({query.min_margin:g}) is above max_margin ({query.max_margin:g}), so no pair can be found; "
            "swap them or leave one out",
            field="min_margin",
        )
    pairs = _pairs(store, run, iteration)
    found = _find(pairs, query)
    numbers: list[int] = found.slice(offset, limit).to_pylist()
    rows = tuple(Pair.model_validate(row) for row in pairs.rows(numbers))
    return PairPage(total=len(found), offset=offset, rows=rows, numbers=tuple(numbers))


def pair_detail(store: ArtifactStore, record: RunRecord, iteration: int, number: int) -> PairDetail:
    """A pair with all responses to its prompt, their raw rewards, and which two were taken.

    Args:
        number: Row of pairs.parquet, as `PairPage.numbers` gives it.

    Raises:
        NotFound: no pairs yet, no pair of this number, or its rollouts are gone from the store.
    """
    pairs = _pairs(store, record.id, iteration)
    if not 0 <= number < pairs.num_rows:
        raise NotFound(
            f"iteration {iteration} of run {record.id} has pairs 0 to {pairs.num_rows - 1}, not {number}",
            field="number",
        )
    pair = Pair.model_validate(pairs.rows([number])[0])
    chunk = _chunk_of(store, record, iteration, pair.prompt_id)
    found = _row_of(store, layout.rollouts_file(record.id, iteration, chunk), pair.prompt_id)
    if found is None:
        raise NotFound(
            f"the responses to prompt {pair.prompt_id} (pair {number}) are not in the store any more", field="number"
        )
    rollout = Rollout.model_validate(found)
    scores = _row_of(store, layout.scores_file(record.id, iteration, chunk), pair.prompt_id, ["prompt_id", "rewards"])
    rewards: list[float | None] = scores["rewards"] if scores else [None] * len(rollout.responses)
    roles: dict[int, Literal["chosen", "rejected"]] = {pair.chosen_index: "chosen", pair.rejected_index: "rejected"}
    responses = tuple(
        JudgedResponse(
            index=index, text=one.text, reward=reward, tokens=len(one.token_ids), finish_reason=one.finish_reason,
            temperature=one.temperature, role=roles.get(index),
        )
        for index, (one, reward) in enumerate(zip(rollout.responses, rewards, strict=True))
    )  # fmt: skip
    return PairDetail(number=number, total=pairs.num_rows, pair=pair, messages=rollout.messages, responses=responses)


def _pairs(store: ArtifactStore, run: str, iteration: int) -> OpenTable:
    path = layout.pairs_file(run, iteration)
    if not store.exists(path):
        raise NotFound(f"iteration {iteration} of run {run} has no pairs (yet)", field="iteration")
    return _tables.get(store, path)


def _find(pairs: OpenTable, query: PairQuery) -> Column:
    """Row numbers of what the query finds, in its order."""
    # A subclass that also has offset and limit finds the same rows, whatever the page.
    asked = query.model_dump_json(include=set(PairQuery.model_fields))
    key: tuple[FileKey, str] = (pairs.key, asked)
    return _findings.get(key, lambda: _search(pairs, query))


def _search(pairs: OpenTable, query: PairQuery) -> Column:
    numbers = pa.array(range(pairs.num_rows), pa.int64())
    kept = pa.table({"number": numbers, "key": _sort_key(pairs, query, numbers)})
    conditions: list[Column] = []
    if query.min_margin is not None:
        conditions.append(pc.greater_equal(pairs.columns(["margin"])["margin"], query.min_margin))
    if query.max_margin is not None:
        conditions.append(pc.less_equal(pairs.columns(["margin"])["margin"], query.max_margin))
    if query.search:
        conditions.append(pc.is_in(numbers, value_set=_numbers_with(pairs, query.search)))
    for index, condition in enumerate(conditions):
        kept = kept.append_column(f"condition {index}", condition)
    for index in range(len(conditions)):
        kept = kept.filter(kept[f"condition {index}"])
    order = "descending" if query.descending else "ascending"
    indices = pc.sort_indices(kept, sort_keys=[("key", order), ("number", "ascending")])
    return kept["number"].combine_chunks().take(indices)


def _sort_key(pairs: OpenTable, query: PairQuery, numbers: Column) -> Column:
    if query.sort == "row":
        return numbers
    column = LENGTHS.get(query.sort, query.sort)
    values = pairs.columns([column])[column]
    return pc.list_value_length(values) if query.sort in LENGTHS else values


def _numbers_with(pairs: OpenTable, text: str) -> Column:
    """Rows with the text in a message of prompt, chosen or rejected; capitals do not matter."""
    found: list[Column] = []
    for name in TEXTS:
        start = 0
        for chunk in pairs.columns([name])[name].chunks:
            messages = pc.struct_field(pc.list_flatten(chunk), "content")
            hits = pc.match_substring(messages, text, ignore_case=True)
            rows = pc.list_parent_indices(chunk).filter(hits)
            found.append(pc.add(rows.cast(pa.int64()), start))
            start += len(chunk)
    return pa.chunked_array(found, pa.int64()).unique()


def _chunk_of(store: ArtifactStore, record: RunRecord, iteration: int, prompt_id: str) -> int:
    """The chunk a prompt was sampled in: chunks are consecutive slices of the iteration's prompts."""

    def places() -> dict[str, int]:
        path = layout.prompts_file(record.id, iteration)
        ids = read_columns(store.local_file(path), path, ["id"])["id"].to_pylist()
        return {id: place // record.recipe.sampling.chunk_size for place, id in enumerate(ids)}

    known = _places.get((store.url, record.id, record.created_at, iteration), places)
    if prompt_id not in known:
        raise StoreError(f"prompt {prompt_id} has a pair and is not among the prompts of iteration {iteration}")
    return known[prompt_id]


def _row_of(store: ArtifactStore, path: str, prompt_id: str, columns: list[str] | None = None) -> dict[str, Any] | None:
    if not store.exists(path):
        return None
    table = read_columns(store.local_file(path), path, columns)
    place: int = pc.index(table["prompt_id"], prompt_id).as_py()
    return table.slice(place, 1).to_pylist()[0] if place >= 0 else None
