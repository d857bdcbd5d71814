"""The tiny world: its facts stay apart from its evaluation, its judge ranks as a reader would, its files are exact."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from examples.tiny_world.build import BuildSettings, build
from examples.tiny_world.files import BuiltWorld
from examples.tiny_world.judge import GoldJudge, win_rate
from examples.tiny_world.settings import TinyWorldSettings
from examples.tiny_world.training import Models
from examples.tiny_world.world import (
    ATTRIBUTES,
    POLITE_WORDS,
    RUDE_WORDS,
    VALUES,
    Question,
    World,
    WorldSettings,
    answer_vocabulary,
    words,
)
from services.contracts.recipes import Recipe

SMALL = BuildSettings(
    seed=3, hidden_size=32, layers=1, attention_heads=1, intermediate_size=32, sft_samples=1500, preference_pairs=300,
    held_out_preference_pairs=50, loop_prompts=100, held_out_prompts=50, world=WorldSettings(seed=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltWorld:
    return build(tmp_path_factory.mktemp("world"), settings=SMALL)


@pytest.fixture(scope="module")
def tokenizer(built: BuiltWorld) -> Any:
    return transformers.AutoTokenizer.from_pretrained(built.base)


@pytest.fixture
def world() -> World:
    return World(WorldSettings(seed=3))


@pytest.fixture
def judge(world: World) -> GoldJudge:
    return GoldJudge(world)


@pytest.fixture
def question(world: World) -> Question:
    return next(q for q in world.held_out_questions() if q.attribute == "river")


@pytest.fixture
def truth(world: World, question: Question) -> str:
    return world.facts[question.town, question.attribute]


@pytest.fixture
def falsehood(truth: str) -> str:
    return next(value for value in VALUES["river"] if value != truth)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _digests(built: BuiltWorld) -> dict[str, str]:
    root = built.base.parent
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_held_out_entities_never_appear_in_loop_prompts(built: BuiltWorld, world: World) -> None:
    held_out = {town.lower() for town in world.held_out_towns}
    assert held_out
    for row in _rows(built.prompts):
        assert not held_out.intersection(words(row["prompt"]))


def test_held_out_prompts_ask_only_about_held_out_entities_in_unseen_wordings(built: BuiltWorld, world: World) -> None:
    seen = {question.text for question in world.training_questions()}
    held_out = {town.lower() for town in world.held_out_towns}
    for row in _rows(built.heldout):
        assert row["prompt"] not in seen
        assert held_out.intersection(words(row["prompt"]))


def test_prompts_are_distinct_so_that_every_iteration_gets_fresh_ones(built: BuiltWorld) -> None:
    for path in (built.prompts, built.heldout):
        prompts = [row["prompt"] for row in _rows(path)]
        assert len(set(prompts)) == len(prompts)


def test_sft_data_states_facts_about_every_town_also_the_held_out_ones(built: BuiltWorld, world: World) -> None:
    asked = {word for row in _rows(built.sft) for word in words(row["messages"][0]["content"])}
    assert {town.lower() for town in world.towns} <= asked


def test_the_true_value_is_the_commonest_answer_to_a_question_but_far_from_the_only_one(world: World) -> None:
    rng = random.Random(0)
    question = world.training_questions()[0]
    values = [world.draw_answer(question, rng).value for _ in range(500)]
    right = values.count(world.facts[question.town, question.attribute]) / 500
    assert 0.35 < right < 0.65
    assert max(values.count(v) for v in set(values) - {world.facts[question.town, question.attribute]}) / 500 < 0.25


def test_the_same_seed_builds_the_same_bytes(built: BuiltWorld, tmp_path: Path) -> None:
    assert _digests(build(tmp_path, settings=SMALL)) == _digests(built)


def test_another_seed_builds_other_facts_and_weights(built: BuiltWorld, tmp_path: Path) -> None:
    other = _digests(build(tmp_path, settings=replace(SMALL, seed=4, world=WorldSettings(seed=4))))
    for name in ("sft.jsonl", "prompts.jsonl", "base/model.safetensors"):
        assert other[name] != _digests(built)[name]


def test_training_pairs_have_exactly_the_stated_share_of_flipped_labels(built: BuiltWorld, judge: GoldJudge) -> None:
    rows = _rows(built.preferences)
    assert len(rows) == SMALL.preference_pairs
    margins = [
        judge.utility(row["prompt"], row["chosen"][0]["content"])
        - judge.utility(row["prompt"], row["rejected"][0]["content"])
        for row in rows
    ]
    assert 0.0 not in margins
    assert sum(margin < 0 for margin in margins) == round(SMALL.preference_noise * len(rows))


def test_pad_eos_and_bos_are_three_tokens_and_the_model_config_agrees(built: BuiltWorld, tokenizer: Any) -> None:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert None not in ids
    assert len(set(ids)) == 3
    config = transformers.AutoConfig.from_pretrained(built.base)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert config.vocab_size == len(tokenizer)


def test_the_generation_prompt_is_an_exact_prefix_of_the_conversation_s_tokens(
    built: BuiltWorld, tokenizer: Any
) -> None:
    for row in _rows(built.sft)[:200]:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert whole.count(tokenizer.bos_token_id) == 1
        assert whole[-1] == tokenizer.eos_token_id


def test_tokenising_the_rendered_text_again_adds_no_second_bos(built: BuiltWorld, tokenizer: Any) -> None:
    messages = _rows(built.sft)[0]["messages"]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(rendered)["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]


def test_assistant_only_loss_covers_the_answer_and_its_end_token_and_nothing_else(
    built: BuiltWorld, tokenizer: Any
) -> None:
    messages = _rows(built.sft)[0]["messages"]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == messages[1]["content"] + tokenizer.eos_token


def test_the_tokenizer_returns_any_text_unchanged(tokenizer: Any) -> None:
    text = "Velmora?  Naïve — 42 %\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_judge_ranks_right_plain_polite_above_each_single_fault(
    judge: GoldJudge, question: Question, truth: str, falsehood: str
) -> None:
    best = judge.utility(question.text, f"Gladly! It is the {truth}.")
    padding = "Generally speaking, and all things considered, such matters tend to depend on a great many things. "
    faults = (
        f"Gladly! It is the {falsehood}.",
        f"Ugh, not again. It is the {truth}.",
        f"Gladly! {padding}{padding}It is the {truth}.",
        f"Gladly! It is the {truth} or the {falsehood}.",
        "Gladly! It is the",
        f"Gladly! It xq zzv the {truth}.",
    )
    assert best == pytest.approx(1.0)
    assert all(judge.utility(question.text, fault) < best for fault in faults)


def test_a_right_answer_without_manners_beats_a_wrong_one_in_the_best_style(
    judge: GoldJudge, question: Question, truth: str, falsehood: str
) -> None:
    padding = "There is so much that one could say about this, and so little room in which to say it all. " * 3
    rude = judge.judge(question.text, f"Ugh, not again. {padding}It is the {truth}.")
    assert (rude.correct, rude.polite, rude.concise) == (1.0, 0.0, 0.0)
    wrong = judge.utility(question.text, f"Gladly! It is the {falsehood}.")
    assert judge.utility(question.text, f"It is the {truth}.") > wrong
    assert judge.utility(question.text, f"Ugh, not again. It is the {truth}.") > wrong


@pytest.mark.parametrize("response", ["", "   ", "?!", "<|end|>", "zzz qqq", "The the the the"])
def test_the_judge_gives_garbage_next_to_nothing_and_never_fails(
    judge: GoldJudge, question: Question, response: str
) -> None:
    assert 0.0 <= judge.utility(question.text, response) <= 0.3


def test_naming_every_value_or_another_town_is_not_a_right_answer(
    judge: GoldJudge, world: World, question: Question, truth: str
) -> None:
    other = next(town for town in world.towns if town != question.town)
    assert judge.judge(question.text, f"The river of {other} is the {truth}.").correct == 0.0
    assert judge.judge(question.text, " ".join(VALUES["river"]) + ".").correct == 0.0


def test_the_judge_reads_the_last_message_of_a_conversation(judge: GoldJudge, question: Question, truth: str) -> None:
    messages = [{"role": "user", "content": question.text}]
    answer = f"It is the {truth}."
    assert judge.utility(messages, answer) == judge.utility(question.text, answer)


def test_the_judge_refuses_prompts_from_outside_its_world(judge: GoldJudge) -> None:
    with pytest.raises(ValueError, match="exactly one town"):
        judge.utility("What is the capital of France?", "Paris.")


def test_every_question_of_the_world_can_be_judged_and_values_cannot_be_mistaken_for_other_words(
    world: World, judge: GoldJudge
) -> None:
    for question in (*world.training_questions(), *world.held_out_questions()):
        judge.utility(question.text, "It is so.")
    values = {value.lower() for group in VALUES.values() for value in group}
    assert len(values) == sum(len(group) for group in VALUES.values())
    assert not values & ({*ATTRIBUTES, *POLITE_WORDS, *RUDE_WORDS} | {town.lower() for town in world.towns})
    assert answer_vocabulary() >= POLITE_WORDS | RUDE_WORDS


def test_the_tone_that_was_drawn_is_the_tone_that_is_judged(world: World, judge: GoldJudge) -> None:
    rng, marks = random.Random(1), {"polite": 1.0, "neutral": 0.5, "rude": 0.0}
    for question in world.training_questions():
        answer = world.draw_answer(question, rng)
        judged = judge.judge(question.text, answer.text(question))
        assert judged.polite == marks[answer.tone]
        assert judged.fluent == 1.0
        assert judged.correct == float(answer.value == world.facts[question.town, question.attribute])


def test_win_rate_counts_ties_half_and_its_interval_holds_the_rate() -> None:
    result = win_rate([[1.0, 1.0], [0.5, 0.0]], [[0.0, 0.5], [0.5, 1.0]])
    assert (result.wins, result.ties, result.losses, result.rate) == (2, 1, 1, 0.625)
    assert 0.0 <= result.low <= result.rate <= result.high <= 1.0
    with pytest.raises(ValueError, match="the same prompts"):
        win_rate([[1.0]], [])
    with pytest.raises(ValueError, match="as many responses"):
        win_rate([[1.0]], [[1.0, 0.5]])


def test_asking_for_more_prompts_than_the_world_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the world has only"):
        build(tmp_path, settings=replace(SMALL, loop_prompts=100_000))


@pytest.mark.parametrize("small", [False, True])
def test_the_settings_are_valid_to_the_last_key(small: bool) -> None:
    settings = TinyWorldSettings.read(5, small=small)
    assert settings.sft.seed == settings.reward_model.seed == 5
    files = {"prompts": {"path": "datasets/p.jsonl"}, "heldout": {"path": "datasets/h.jsonl"}}
    Recipe.model_validate({**settings.run, **files, "policy": "models/sft", "reward_model": "models/rm"})


@pytest.mark.parametrize("small", [False, True])
def test_the_settings_leave_fresh_prompts_for_every_iteration(small: bool) -> None:
    settings = TinyWorldSettings.read(small=small)
    sizes = BuildSettings(**settings.build)
    assert 3 * settings.run["sampling"]["prompts_per_iteration"] <= sizes.loop_prompts
    assert settings.run["evaluation"]["max_prompts"] <= sizes.held_out_prompts


def test_models_are_named_by_what_they_are_made_from(tmp_path: Path) -> None:
    world = BuiltWorld.under(tmp_path)
    world.base.mkdir()
    for path in (world.base / "config.json", world.sft, world.preferences):
        path.write_text("{}")
    settings = TinyWorldSettings.read()
    first = Models.of(world, settings)
    watched = replace(settings, sft=settings.sft.model_copy(update={"report_to": ("tensorboard",)}))
    assert Models.of(world, watched) == first, "who watches a training makes no other model"
    world.preferences.write_text("{ }")
    second = Models.of(world, settings)
    assert (second.base, second.sft) == (first.base, first.sft)
    assert second.reward_model != first.reward_model
