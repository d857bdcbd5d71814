"""Build the tiny world's files: an untrained base model with its tokenizer, and the data sets of every stage.

    python -m examples.tiny_world.build --out DIR --seed 0 [--small]

The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.tiny_world.files import BuiltWorld
from examples.tiny_world.judge import GoldJudge
from examples.tiny_world.settings import TinyWorldSettings
from examples.tiny_world.world import Question, World, WorldSettings, evasion

BOS, EOS, PAD, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"

# The template writes the only BOS; the tokenizer adds none of its own. The end token is inside the generation block, so
# that assistant-only loss trains it. Each turn ends on a special token, so no merge can cross from prompt to response.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('this template knows only the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class BuildSettings:
    """Sizes of the model and of the data sets. `preference_noise` is the share of labels that are flipped."""

    seed: int = 0
    vocabulary_size: int = 768
    hidden_size: int = 128
    layers: int = 3
    attention_heads: int = 4
    intermediate_size: int = 384
    max_position_embeddings: int = 256
    initializer_range: float = 0.06
    tie_word_embeddings: bool = False
    sft_samples: int = 5000
    preference_pairs: int = 5000
    held_out_preference_pairs: int = 400
    contrast_share: float = 0.6
    evasive_share: float = 0.15
    preference_noise: float = 0.1
    loop_prompts: int = 1440
    held_out_prompts: int = 400
    world: WorldSettings = field(default_factory=WorldSettings)


def build(out: Path, seed: int = 0, settings: BuildSettings | None = None) -> BuiltWorld:
    """Write the world of `seed` under `out` and return the paths. `settings`, when given, brings its own seed."""
    settings = settings or BuildSettings(seed=seed, world=WorldSettings(seed=seed))
    paths = BuiltWorld.under(out)
    out.mkdir(parents=True, exist_ok=True)
    world = World(settings.world)
    conversations = sft_conversations(world, settings.sft_samples)
    train, held_out = preference_pairs(world, settings)
    _write_jsonl(paths.sft, conversations)
    _write_jsonl(paths.preferences, train)
    _write_jsonl(paths.preferences_heldout, held_out)
    _write_jsonl(paths.prompts, _prompt_rows(world, world.loop_questions(), settings.loop_prompts, "loop"))
    _write_jsonl(paths.heldout, _prompt_rows(world, world.held_out_questions(), settings.held_out_prompts, "held out"))
    paths.settings.write_text(json.dumps(asdict(settings), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(
        [message["content"] for row in conversations for message in row["messages"]],
        settings.vocabulary_size,
        settings.max_position_embeddings,
    )
    transformers.utils.logging.disable_progress_bar()  # the whole model is 3 MB
    tokenizer.save_pretrained(paths.base)
    initialise_model(settings, tokenizer).save_pretrained(paths.base)
    return paths


def sft_conversations(world: World, count: int) -> list[dict[str, Any]]:
    """`count` one-turn conversations: questions in training wordings about all towns, answers from the mixture."""
    rng = world.rng("sft")
    rows = []
    for question in _cycle_shuffled(world, count, "sft questions"):
        answer = world.draw_answer(question, rng).text(question)
        rows.append({"messages": [_turn("user", question.text), _turn("assistant", answer)]})
    return rows


def preference_pairs(world: World, settings: BuildSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out pairs, labelled by gold utility, of which a known share is then flipped in each.

    A `contrast_share` of the pairs are short answers that differ only in the value they name (or the reward model
    learns style and no facts), an `evasive_share` of these in whether they answer at all (or the loop finds out that
    a polite nothing scores well); the rest are two independent answers. Ties are left out.
    """
    judge, rng = GoldJudge(world), world.rng("preferences")
    total = settings.preference_pairs + settings.held_out_preference_pairs
    questions = iter(_cycle_shuffled(world, 3 * total, "preference questions"))
    pairs: list[tuple[str, str, str]] = []
    while len(pairs) < total:
        question = next(questions)
        first = world.draw_answer(question, rng)
        if rng.random() < settings.contrast_share:
            first = replace(first, padding="")
            evades = rng.random() < settings.evasive_share
            second = evasion(first) if evades else world.draw_contrast(question, first, rng)
        else:
            second = world.draw_answer(question, rng)
        ranked = sorted(
            (judge.utility(question.text, text), text) for text in (first.text(question), second.text(question))
        )
        if ranked[0][0] < ranked[1][0]:
            pairs.append((question.text, ranked[1][1], ranked[0][1]))
    return (
        _flip(pairs[: settings.preference_pairs], settings.preference_noise, world, "train"),
        _flip(pairs[settings.preference_pairs :], settings.preference_noise, world, "held out"),
    )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with distinct bos, eos and pad tokens, and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def initialise_model(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama in fp32, the same for the same seed; the global generator is left as it was."""
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),  # BPE may run out of merges before vocabulary_size
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.attention_heads,
        num_key_value_heads=settings.attention_heads,
        max_position_embeddings=settings.max_position_embeddings,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=settings.tie_word_embeddings,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def _cycle_shuffled(world: World, count: int, purpose: str) -> list[Question]:
    """`count` training questions; each is used equally often, give or take one."""
    rng = world.rng(purpose)
    questions: list[Question] = []
    while len(questions) < count:
        round_ = world.training_questions()
        rng.shuffle(round_)
        questions.extend(round_)
    return questions[:count]


def _prompt_rows(world: World, questions: list[Question], count: int, purpose: str) -> list[dict[str, Any]]:
    if count > len(questions):
        raise ValueError(f"{count} {purpose} prompts: the world has only {len(questions)}; ask for at most that many")
    return [{"prompt": question.text} for question in world.rng(purpose).sample(questions, count)]


def _flip(pairs: list[tuple[str, str, str]], noise: float, world: World, purpose: str) -> list[dict[str, Any]]:
    """Rows of TRL's conversational preference format; exactly round(noise * n) of them have their labels swapped."""
    flipped = set(world.rng(f"noise {purpose}").sample(range(len(pairs)), round(noise * len(pairs))))
    rows = []
    for i, (prompt, better, worse) in enumerate(pairs):
        chosen, rejected = (worse, better) if i in flipped else (better, worse)
        rows.append(
            {
                "prompt": [_turn("user", prompt)],
                "chosen": [_turn("assistant", chosen)],
                "rejected": [_turn("assistant", rejected)],
            }
        )
    return rows


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Build the tiny world's base model and data sets.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="the sizes of recipe-small.toml")
    arguments = parser.parse_args()
    sizes = TinyWorldSettings.read(arguments.seed, small=arguments.small).build
    settings = BuildSettings(seed=arguments.seed, world=WorldSettings(seed=arguments.seed), **sizes)
    for name, path in asdict(build(arguments.out, settings=settings)).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
