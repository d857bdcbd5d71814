"""Looking through pairs: what a query finds, in which order, and a pair among its responses."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from services.contracts import layout
from services.contracts.browsing import PairQuery
from services.contracts.conversations import Message, Prompt
from services.contracts.errors import InvalidInput, NotFound, StoreError
from services.contracts.pairs import Pair
from services.contracts.recipes import ResolvedModels
from services.contracts.rollouts import Response, Rollout
from services.contracts.runs import RunRecord
from services.contracts.scores import ScoreRow
from services.orchestrator import open_tables
from services.orchestrator.open_tables import OpenTables
from services.orchestrator.pair_reading import pair_detail, pair_page
from services.platform.store import ArtifactStore
from services.platform.tables import publish_rows
from tests.fixtures.orchestrator_stack import recipe

RECORD = RunRecord(
    id="r", created_at="2026-11-24", recipe=recipe("datasets/a.jsonl", "datasets/b.jsonl"), prompts_total=24,
    heldout_total=6, models=ResolvedModels(policy="models/sft", reward_model="models/reward"),
)  # fmt: skip
"""10 prompts in chunks of 4."""


def said(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


def pair(number: int, margin: float, *, chosen: str = "yes", tokens: int = 2, question: str = "why?") -> Pair:
    return Pair(
        prompt_id=f"p{number}", prompt=(Message(role="user", content=question),), chosen=said(chosen),
        rejected=said("no"), prompt_ids=(1,), chosen_ids=tuple(range(tokens)), rejected_ids=(9,),
        chosen_reward=margin + number, rejected_reward=float(number), margin=margin, chosen_index=1, rejected_index=0,
        policy_version="models/sft", scorer="default", scorer_revision="models/reward",
    )  # fmt: skip


PAIRS = [
    pair(0, 0.5, chosen="A Zebra crosses", tokens=7),
    pair(1, 2.0, tokens=3),
    pair(2, 0.5, question="What is a zebra?", tokens=5),
    pair(3, 1.0, chosen="100 % (sure) .*", tokens=1),
    pair(4, 3.0, chosen="ÄRGER", tokens=2),
]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(str(tmp_path / "store"))
    publish_rows(store, layout.pairs_file("r", 1), PAIRS, Pair)
    return store


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        (PairQuery(), [0, 1, 2, 3, 4]),
        (PairQuery(descending=True), [4, 3, 2, 1, 0]),
        (PairQuery(sort="margin"), [0, 2, 3, 1, 4]),
        (PairQuery(sort="margin", descending=True), [4, 1, 3, 0, 2]),  # equal ones stay in the file's order
        (PairQuery(sort="chosen_tokens"), [3, 4, 1, 2, 0]),
        (PairQuery(sort="rejected_tokens", descending=True), [0, 1, 2, 3, 4]),
        (PairQuery(sort="chosen_reward"), [0, 2, 1, 3, 4]),
        (PairQuery(sort="rejected_reward", descending=True), [4, 3, 2, 1, 0]),
        (PairQuery(min_margin=1.0), [1, 3, 4]),
        (PairQuery(max_margin=1.0), [0, 2, 3]),
        (PairQuery(min_margin=1.0, max_margin=2.0, sort="margin"), [3, 1]),
        (PairQuery(search="zeBRA"), [0, 2]),
        (PairQuery(search="ärger"), [4]),
        (PairQuery(search="% (sure) .*"), [3]),  # text, not a pattern
        (PairQuery(search="assistant"), []),  # roles are no text
        (PairQuery(search=""), [0, 1, 2, 3, 4]),
        (PairQuery(search="zebra", sort="chosen_tokens", max_margin=0.5), [2, 0]),
    ],
)
def test_a_query_finds_its_pairs_in_its_order_mapped_or_not(
    store: ArtifactStore, query: PairQuery, numbers: list[int]
) -> None:
    for _ in range(3):  # the first look decodes the file; later ones read its map, as soon as it is there
        page = pair_page(store, "r", 1, query, 0, 50)
        assert (page.total, list(page.numbers)) == (len(numbers), numbers)
        assert list(page.rows) == [PAIRS[number] for number in numbers]


def test_a_page_is_a_slice_of_what_is_found(store: ArtifactStore) -> None:
    page = pair_page(store, "r", 1, PairQuery(sort="margin"), 1, 2)
    assert (page.total, page.offset, page.numbers) == (5, 1, (2, 3))
    beyond = pair_page(store, "r", 1, PairQuery(), 7, 2)
    assert (beyond.total, beyond.rows) == (5, ())


def test_margins_the_wrong_way_round_and_missing_pairs_are_told(store: ArtifactStore) -> None:
    with pytest.raises(InvalidInput, match=r"min_margin \(2\) is above max_margin \(1\)") as raised:
        pair_page(store, "r", 1, PairQuery(min_margin=2, max_margin=1), 0, 5)
    assert raised.value.field == "min_margin"
    with pytest.raises(NotFound) as missing:
        pair_page(store, "r", 2, PairQuery(), 0, 5)
    assert missing.value.field == "iteration"


def test_a_file_that_is_no_table_is_named(store: ArtifactStore) -> None:
    store.publish_bytes(layout.pairs_file("r", 3), b"not parquet")
    with pytest.raises(StoreError, match=r"iter-3/pairs\.parquet is not a readable Parquet file"):
        pair_page(store, "r", 3, PairQuery(), 0, 5)


def test_a_file_asked_for_again_is_read_from_its_map_with_equal_rows(store: ArtifactStore) -> None:
    tables = OpenTables(1 << 20)
    first = tables.get(store, layout.pairs_file("r", 1))
    assert first.mapping is None
    decoded = first.rows([4, 0])
    again = tables.get(store, layout.pairs_file("r", 1))
    assert again.mapping is not None
    again.mapping.result(timeout=30)
    assert again.map is not None
    assert again.rows([4, 0]) == decoded


def test_a_map_lies_on_the_store_s_disk_and_leaves_nothing_behind(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = tempfile.TemporaryFile

    def temporary(dir: Path) -> Any:
        made.append(str(dir))
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    tables = OpenTables(1 << 20)
    tables.get(store, layout.pairs_file("r", 1))
    table = tables.get(store, layout.pairs_file("r", 1))
    assert table.mapping is not None
    table.mapping.result(timeout=30)
    assert made == [f"{store.url}/.work/tables"]
    assert list(Path(made[0]).iterdir()) == []
    assert table.rows([1])[0]["prompt_id"] == "p1", "the map is whole without its name"


def test_the_map_is_done_without_when_the_temporary_folder_is_full(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> object:
        raise OSError("No space left on device")

    monkeypatch.setattr(open_tables, "_mapped", full)
    tables = OpenTables(1 << 20)
    tables.get(store, layout.pairs_file("r", 1))
    table = tables.get(store, layout.pairs_file("r", 1))
    assert isinstance(table.mapping, Future)
    assert table.mapping.exception(timeout=30) is not None
    assert table.rows([1])[0]["prompt_id"] == "p1"


def test_opened_tables_are_bounded_and_the_one_in_use_is_kept(store: ArtifactStore) -> None:
    publish_rows(store, layout.pairs_file("r", 2), PAIRS, Pair)
    tables = OpenTables(1)
    first = tables.get(store, layout.pairs_file("r", 1))
    assert tables.get(store, layout.pairs_file("r", 1)) is first
    tables.get(store, layout.pairs_file("r", 2))
    assert tables.get(store, layout.pairs_file("r", 1)) is not first


def answer(text: str, temperature: float) -> Response:
    return Response(
        text=text, token_ids=(1, 2, 3), logprob=-1.0, finish_reason="stop", temperature=temperature, top_p=1.0, seed=1,
        index=0,
    )  # fmt: skip


def publish_chunks(store: ArtifactStore) -> None:
    ids = [f"p{number}" for number in (9, 8, 7, 6, 4, 3, 2, 1, 0, 5)]  # the order of drawing is not that of the pairs
    messages = (Message(role="user", content="why?"),)
    publish_rows(store, layout.prompts_file("r", 1), [Prompt(id=id, messages=messages) for id in ids], Prompt)
    for chunk in range(3):
        here = ids[chunk * 4 : chunk * 4 + 4]
        rollouts = [
            Rollout(
                prompt_id=id, messages=messages, prompt_token_ids=(1,), policy_version="models/sft",
                responses=(answer(f"{id} no", 1.0), answer(f"{id} yes", 0.7), answer(f"{id} perhaps", 0.7)),
            )
            for id in here
        ]  # fmt: skip
        scores = [
            ScoreRow(
                prompt_id=id, rewards=(int(id[1:]), int(id[1:]) + 1.5, 0.25), scorer="default",
                revision="models/reward", template_hash="t",
            )
            for id in reversed(here)
        ]  # fmt: skip
        publish_rows(store, layout.rollouts_file("r", 1, chunk), rollouts, Rollout)
        publish_rows(store, layout.scores_file("r", 1, chunk), scores, ScoreRow)


def test_a_pair_is_shown_among_all_responses_with_their_own_rewards(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_chunks(store)
    read: list[str] = []
    local_file = ArtifactStore.local_file
    monkeypatch.setattr(ArtifactStore, "local_file", lambda self, path: read.append(path) or local_file(self, path))
    detail = pair_detail(store, RECORD, 1, 2)
    assert (detail.number, detail.total, detail.pair) == (2, 5, PAIRS[2])
    assert [one.text for one in detail.responses] == ["p2 no", "p2 yes", "p2 perhaps"]
    assert [one.reward for one in detail.responses] == [2.0, 3.5, 0.25]
    assert [one.role for one in detail.responses] == ["rejected", "chosen", None]
    assert [(one.tokens, one.temperature) for one in detail.responses] == [(3, 1.0), (3, 0.7), (3, 0.7)]
    chunks = {path for path in read if "rollouts" in path or "scores" in path}
    assert chunks == {layout.rollouts_file("r", 1, 1), layout.scores_file("r", 1, 1)}, "one chunk is read, not all"


def test_a_pair_that_is_not_there_or_whose_rollouts_are_gone_is_told(store: ArtifactStore) -> None:
    for number in (5, -1):
        with pytest.raises(NotFound, match="has pairs 0 to 4") as raised:
            pair_detail(store, RECORD, 1, number)
        assert raised.value.field == "number"
    publish_rows(
        store, layout.prompts_file("r", 1), [Prompt(id="p0", messages=(Message(role="user", content="why?"),))], Prompt
    )
    with pytest.raises(NotFound, match="not in the store any more"):
        pair_detail(store, RECORD, 1, 0)
