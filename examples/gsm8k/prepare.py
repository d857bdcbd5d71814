"""Make what a run on GSM8K needs and the hub would give: a small untrained model, and preference pairs.

    python -m examples.gsm8k.prepare --train gsm8k_train.jsonl --out gsm8k-work

Reads rows of `question` and `answer` (openai/grade-school-math). Writes `base/` (a Hugging Face folder: BPE tokenizer
trained on the rows, randomly initialised Llama) and `preferences.jsonl` (the right answer against one whose final
number is wrong). Use your own model folder instead of `base/`, and your own preferences, where you have them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

from examples.tiny_world.build import BuildSettings, initialise_model, train_tokenizer

MODEL = BuildSettings(
    vocabulary_size=2048,
    hidden_size=192,
    layers=4,
    attention_heads=6,
    intermediate_size=512,
    max_position_embeddings=1024,
)
"""About 2.6 million parameters: learns the form of an answer in a minute of CPU, not arithmetic."""
FINAL = re.compile(r"(#### *)(-?[\d,]+)")


def wrong_answer(answer: str, rng: random.Random) -> str:
    """The same answer with another final number; unchanged when it has none."""

    def change(match: re.Match[str]) -> str:
        number = int(match[2].replace(",", ""))
        return f"{match[1]}{number + rng.choice([-1, 1]) * rng.randint(1, 50)}"

    return FINAL.sub(change, answer)


def prepare(train: Path, out: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write `base/` and `preferences.jsonl` under `out`; returns both paths.

    Raises:
        ValueError: a row is not JSON with `question` and `answer`; the message names the line.
    """
    rng = random.Random(seed)
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(train.read_text(encoding="utf-8").split("\n"), 1):  # not splitlines: U+2028 is text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row["question"], row["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{train}, line {number}: needs JSON with 'question' and 'answer' ({error!r})") from error
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(
        [text for row in rows for text in row], MODEL.vocabulary_size, MODEL.max_position_embeddings
    )
    tokenizer.save_pretrained(out / "base")
    initialise_model(replace(MODEL, seed=seed), tokenizer).save_pretrained(out / "base")
    pairs = out / "preferences.jsonl"
    with pairs.open("w", encoding="utf-8") as file:
        for question, answer in rows:
            wrong = wrong_answer(answer, rng)
            if wrong == answer:
                continue
            pair = {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": wrong}],
            }
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return out / "base", pairs


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Make a small base model and preference pairs for GSM8K.")
    parser.add_argument("--train", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        for path in prepare(options.train, options.out, options.seed):
            print(path)
    except (OSError, ValueError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
