#!/usr/bin/env python3
"""Write docs/settings.md, docs/metrics.md and the table of docs/recipes.md from the code. `make docs` runs it.

python -m scripts.reference_docs [--check]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scripts.markdown import NOTE, ROOT, cell, shown, table, write

DOCS = ROOT / "docs"
BEGIN, END = "<!-- written by `make docs`: begin -->", "<!-- written by `make docs`: end -->"
SERVICES = ("orchestrator", "generator", "reward", "trainer")


def pages() -> dict[Path, str]:
    """Every page, by its path. docs/recipes.md keeps its text around the table."""
    recipes = DOCS / "recipes.md"
    return {
        DOCS / "settings.md": settings_page(),
        DOCS / "metrics.md": metrics_page(),
        recipes: between(recipes.read_text(encoding="utf-8"), recipe_table()),
    }


def between(text: str, new: str) -> str:
    """`text` with what stands between the two marks replaced."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


# -- settings ---------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """All settings of the services: the common ones once, then each service's own."""
    from services.generator.settings import GeneratorSettings
    from services.orchestrator.settings import OrchestratorSettings
    from services.platform.settings import ServiceSettings
    from services.reward.settings import RewardSettings
    from services.trainer.settings import TrainerSettings

    kinds: dict[str, type[BaseModel]] = dict(
        zip(SERVICES, (OrchestratorSettings, GeneratorSettings, RewardSettings, TrainerSettings), strict=True)
    )
    header = ("variable", "type", "default", "what")
    parts = [
        NOTE,
        "# Settings of the services",
        "Every setting is an environment variable. Lists, maps and pairs are written as JSON. A wrong value ends the "
        "service at its start, with exit status 2 and a line that names the variable. With containers they stand in "
        "`.env`; with `ratchet up` they are given as `--set NAME=VALUE` or taken from the shell.",
        "## Every service",
        table(header, [setting_row(name, field) for name, field in ServiceSettings.model_fields.items()]),
    ]
    for service, kind in kinds.items():
        own = {name: field for name, field in kind.model_fields.items() if name not in ServiceSettings.model_fields}
        parts += [f"## {service.capitalize()}", table(header, [setting_row(n, f) for n, f in own.items()])]
    return "\n\n".join(parts) + "\n"


def setting_row(name: str, field: FieldInfo) -> tuple[str, ...]:
    """Variable, type, default and description of a setting."""
    return f"`RATCHET_{name.upper()}`", kind_of(field.annotation), default_of(field), cell(field.description or "")


def default_of(field: FieldInfo) -> str:
    """A field's default as it would be written; what depends on the machine says so."""
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        made = field.default_factory() if field.default_factory in (dict, list, tuple) else None  # pyright: ignore
        return "by the machine" if made is None else shown(made)
    return shown(plain(field.default))


def plain(value: Any) -> Any:
    """A default as JSON holds it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def kind_of(annotation: Any) -> str:
    """A type in a few words."""
    origin = getattr(annotation, "__origin__", None)
    inner = [each for each in get_args(annotation) if each is not type(None)]
    if origin is not None and str(origin) == "typing.Literal":
        return " or ".join(f"`{value}`" for value in inner)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return kind_of(inner[0])
    if type(None) in get_args(annotation):
        return " or ".join(kind_of(each) for each in inner)
    if origin in (tuple, list):
        return "list of " + kind_of(inner[0]) if len(inner) < 2 or inner[1] is ... else "pair of numbers"
    if origin is dict:
        return f"map of {kind_of(inner[1])}"
    names = {"str": "text", "int": "number", "float": "number", "bool": "true or false", "SecretStr": "text"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, "path" if name == "Path" else name)


# -- recipes ----------------------------------------------------------------------------------------------------------


def recipe_table() -> str:
    """Every key of a recipe, nested ones with their dots."""
    from services.contracts.recipes import Recipe

    rows = [
        (f"`{key}`", kind_of(field.annotation), default_of(field), cell(field.description or ""))
        for key, field in recipe_keys(Recipe)
    ]
    return table(("key", "type", "default", "what"), rows)


def recipe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each key that holds a value; of a list of tables the keys of one."""
    for name, field in model.model_fields.items():
        nested = nested_model(field.annotation)
        if nested is None:
            yield prefix + name, field
        else:
            many = getattr(field.annotation, "__origin__", None) is tuple
            yield from recipe_keys(nested, f"{prefix}{name}{'[]' if many else ''}.")


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The contract that a field holds (one, or a list, or perhaps none of it), if it holds one."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


# -- metrics ----------------------------------------------------------------------------------------------------------


def metrics_page() -> str:
    """All metrics, by who has them."""
    groups: dict[str, dict[str, Any]] = {}
    for owner, metric in all_metrics():
        if not any(full_name(metric) in known for known in groups.values()):  # imported, not declared again
            groups.setdefault(owner, {})[full_name(metric)] = metric
    parts = [
        NOTE,
        "# Metrics",
        "Each service answers `GET /metrics` in Prometheus' text format. Names are "
        "`ratchet_<subsystem>_<what>_<unit>`, with `_total` behind what only ever grows. The generator "
        "passes vLLM's own metrics on (`vllm:…`). What the "
        "alerts mean is in [operations](operations.md#alerts).",
    ]
    for owner in ("platform", *SERVICES):
        if owner in groups:
            title = "Every service" if owner == "platform" else owner.capitalize()
            rows = [metric_row(name, metric) for name, metric in sorted(groups[owner].items())]
            parts += [f"## {title}", table(("metric", "type", "labels", "what"), rows)]
    return "\n\n".join(parts) + "\n"


def all_metrics() -> Iterator[tuple[str, Any]]:
    """Every metric that a module of the services declares, with the package that does."""
    from prometheus_client.metrics import MetricWrapperBase

    for owner in ("platform", *SERVICES):
        for path in sorted((ROOT / "services" / owner).rglob("*.py")):
            if "prometheus_client import" not in path.read_text(encoding="utf-8"):
                continue
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            for value in vars(module).values():
                if isinstance(value, MetricWrapperBase) and full_name(value).startswith("ratchet_"):
                    yield owner, value


def full_name(metric: Any) -> str:
    """The name under which Prometheus sees it."""
    name: str = next(iter(metric.describe())).name
    return f"{name}_total" if kind_of_metric(metric) == "counter" else name


def kind_of_metric(metric: Any) -> str:
    """`counter`, `gauge` or `histogram`."""
    return next(iter(metric.describe())).type


def metric_row(name: str, metric: Any) -> tuple[str, ...]:
    """Name, type, labels and help of a metric."""
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"`{name}`", kind_of_metric(metric), labels, cell(next(iter(metric.describe())).documentation)


if __name__ == "__main__":
    sys.exit(write(pages, sys.argv[1:]))
