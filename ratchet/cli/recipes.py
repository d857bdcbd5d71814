"""A recipe from a TOML file and flags: checked before anything is uploaded, every mistake named with its remedy."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from services.contracts.errors import InvalidInput
from services.contracts.recipes import Recipe

FLAGS = {
    "policy": "--policy", "reward_model": "--reward-model", "prompts": "--prompts", "prompts.path": "--prompts",
    "sampling": "--prompts-per-iteration", "sampling.prompts_per_iteration": "--prompts-per-iteration",
    "dpo": "--learning-rate", "dpo.learning_rate": "--learning-rate", "dpo.train_batch_size": "--train-batch-size",
    "dpo.max_length": "--max-length",
}  # fmt: skip
HELDOUT_FRACTION = 0.1
HELDOUT_MOST = 512
STORE_FOLDERS = ("datasets/", "models/", "runs/", "staging/")


@dataclass(frozen=True)
class Draft:
    """A checked recipe whose models and files may still be on this machine."""

    recipe: Recipe
    base: Path
    """Folder that relative paths of the file are relative to."""
    from_flags: frozenset[str]
    """Dotted keys given as flags: their paths are relative to the working folder."""
    split_heldout: bool
    """No held-out prompts were named: they are split off the prompts."""

    def local_path(self, key: str, value: str) -> Path:
        """A value as a path on this machine."""
        path = Path(value).expanduser()
        return path if key in self.from_flags else self.base / path


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file. Raises InvalidInput with the place of a syntax error."""
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        near = difflib.get_close_matches(
            file.name, [p.name for p in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        )
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise InvalidInput(f"{file} does not exist{hint}", field="recipe") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InvalidInput(f"{file} cannot be read as TOML: {error}", field="recipe") from error


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Raises InvalidInput when a part of it is not a table."""
    *parents, last = key.split(".")
    place: Any = data
    for part in parents:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InvalidInput(f"{key}: {part} is not a table", field=key)
    place[last] = value


def parse_setting(assignment: str) -> tuple[str, Any]:
    """`dpo.num_train_epochs=1` as key and value; the value is read as TOML, and as text when it is none."""
    key, sign, text = assignment.partition("=")
    if not sign or not key.strip():
        raise InvalidInput(f"{assignment!r} is not KEY=VALUE, e.g. dpo.num_train_epochs=1", field="set")
    try:
        return key.strip(), tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()


def sampling_groups(n: int | None, temperatures: list[float]) -> list[dict[str, float]] | None:
    """`--n 8 --temperature 1.0 --temperature 0.7`: n responses, shared evenly. None when neither is given."""
    if n is None and not temperatures:
        return None
    heat = temperatures or [1.0, 0.7]
    total = n if n is not None else 8
    if total < 1 or total % len(heat):
        raise InvalidInput(
            f"--n {total} cannot be shared evenly by {len(heat)} temperatures ({', '.join(f'{t:g}' for t in heat)}); "
            f"take a multiple of {len(heat)}, or another number of --temperature",
            field="sampling.groups",
        )
    return [{"n": total // len(heat), "temperature": value} for value in heat]


def draft(file: Path | None, flags: Mapping[str, Any], settings: list[str]) -> Draft:
    """Recipe of a file, overridden by flags (dotted key -> value, None: not given) and `--set`. Raises InvalidInput."""
    data = read_toml(file) if file else {}
    given = {key: value for key, value in flags.items() if value is not None}
    for key, value in [*given.items(), *(parse_setting(one) for one in settings)]:
        put(data, key, value)
        given.setdefault(key, value)
    split = "heldout" not in data or not isinstance(data["heldout"], dict) or "path" not in data["heldout"]
    if split and isinstance(data.get("prompts"), dict):
        data["heldout"] = {**data["prompts"], **(data["heldout"] if isinstance(data.get("heldout"), dict) else {})}
    recipe = check(data, Recipe, str(file) if file else "the flags")
    return Draft(recipe, file.parent if file else Path(), frozenset(given), split)


def check(data: dict[str, Any], model: type[BaseModel], where: str) -> Any:
    """Data as its contract. Raises InvalidInput naming each wrong key, what is allowed, and the flag that gives it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [
            _explain(item, model)
            for item in error.errors()
            if "heldout" not in item["loc"][:1] or len(error.errors()) == 1
        ]
        raise InvalidInput(f"{where}: " + "; ".join(found)) from error


def _explain(item: Any, model: type[BaseModel]) -> str:
    place = [str(part) for part in item["loc"]]
    key = ".".join(place)
    if item["type"] == "extra_forbidden":
        allowed = list(_model_at(model, place[:-1]).model_fields)
        near = difflib.get_close_matches(place[-1], allowed, n=3, cutoff=0.5)
        near = near or [name for name in allowed if place[-1] in name or name in place[-1]]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(allowed)}"
        return f"{key} is an unknown key; {hint}"
    if item["type"] == "missing":
        flag = f"{FLAGS[key]}, or " if key in FLAGS else ""
        return f"{key} is missing; give {flag}it in the file, or --set {key}=..."
    shown = item.get("input")
    value = "" if isinstance(shown, dict | list) or not key else f" = {shown!r}"
    return (
        f"{key}{value}: {item['msg'].removeprefix('Value error, ')}"
        if key
        else item["msg"].removeprefix("Value error, ")
    )


def _model_at(model: type[BaseModel], place: list[str]) -> type[BaseModel]:
    """The contract that holds a key."""
    for part in place:
        field = model.model_fields.get(part)
        if field is None:
            continue  # an index of a list
        candidates = [field.annotation, *get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if nested:
            model = nested[0]
    return model


def looks_local(value: str, path: Path) -> bool:
    """Whether a model's name means a folder here: it exists, or it is written as a path."""
    if value.startswith(STORE_FOLDERS) and not path.exists():
        return False
    return path.is_dir() or value.startswith(("/", "./", "../", "~"))


def split_heldout(file: Path, target: Path, most: int = HELDOUT_MOST) -> int:
    """Write the held-out part of a prompt file to `target` (same format); returns how many rows it has.

    Deterministic: rows are ranked by their hash, so the same file always gives the same part, and equal rows stay
    together.
    The orchestrator leaves held-out prompts out of the pool, so the file itself is uploaded whole, and an error in it
    names the line that an editor shows.

    Raises:
        InvalidInput: fewer than 4 different rows.
    """
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        rows = [json.dumps(row, sort_keys=True, default=str).encode() for row in table.to_pylist()]
        chosen = _held(rows, file, most)
        pq.write_table(table.take(chosen), target)
    else:
        rows = [line for line in file.read_bytes().splitlines() if line.strip()]
        chosen = _held(rows, file, most)
        target.write_bytes(b"".join(rows[index] + b"\n" for index in chosen))
    return len(chosen)


def _held(rows: list[bytes], file: Path, most: int) -> list[int]:
    hashes = [hashlib.sha256(row).hexdigest() for row in rows]
    ranked = sorted(set(hashes))
    if len(ranked) < 4:
        raise InvalidInput(
            f"{file} has {len(ranked)} different prompts, too few to hold some out; give --heldout", field="heldout"
        )
    held = set(ranked[: max(2, min(most, round(len(ranked) * HELDOUT_FRACTION)))])
    return [index for index, value in enumerate(hashes) if value in held]
