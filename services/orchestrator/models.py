"""What a recipe's `policy` and `reward_model` mean: a checkpoint of the store, or a model that a job imports first."""

from __future__ import annotations

import re
from typing import Literal

from services.contracts.checkpoints import CheckpointKind
from services.contracts.errors import InvalidInput, NotFound
from services.contracts.layout import manifest_file
from services.contracts.recipes import Recipe, ResolvedModels
from services.platform.store import ArtifactStore

CHECKPOINT = re.compile(r"models/[A-Za-z0-9][A-Za-z0-9._-]*|runs/[A-Za-z0-9][A-Za-z0-9._-]*/iter-\d+/checkpoint")
STAGED = re.compile(r"staging/([A-Za-z0-9][A-Za-z0-9._-]*)")
HUB = re.compile(r"hub:([A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
HUB_SHORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(?:@[A-Za-z0-9][A-Za-z0-9._/-]*)?")
STORE_FOLDERS = frozenset({"models", "runs", "staging", "datasets"})
ALLOWED = (
    "allowed are a checkpoint of the store (models/NAME or runs/RUN/iter-T/checkpoint), a folder put into the store "
    "(staging/NAME), and a hub model (OWNER/NAME or hub:OWNER/NAME@REVISION)"
)

Field = Literal["recipe.policy", "recipe.reward_model"]


def resolve_models(recipe: Recipe, store: ArtifactStore) -> ResolvedModels:
    """Store folders of the recipe's models, and the sources of those that have to be imported.

    Raises:
        InvalidInput: a model that does not exist, is of the wrong kind, or is a path on somebody's machine.
    """
    policy, policy_import = _resolve(recipe.policy, "policy", "recipe.policy", store)
    reward, reward_import = _resolve(recipe.reward_model, "reward_model", "recipe.reward_model", store)
    if policy == reward:
        raise InvalidInput(
            f"policy and reward_model are the same ({recipe.policy!r}); a reward model has a scalar head and is "
            "trained first (a job of kind reward_model)",
            field="recipe.reward_model",
        )
    return ResolvedModels(
        policy=policy, reward_model=reward, policy_import=policy_import, reward_model_import=reward_import
    )


def _resolve(given: str, kind: CheckpointKind, field: Field, store: ArtifactStore) -> tuple[str, str | None]:
    if CHECKPOINT.fullmatch(given):
        _check_kind(given, kind, field, store)
        return given, None
    if staged := STAGED.fullmatch(given):
        folder = f"models/{staged[1]}"
        if _imported(folder, kind, field, store):
            return folder, None
        if not store.exists(given):
            raise InvalidInput(
                f"{given} is not in the artifact store; 'ratchet run' puts local folders there", field=field
            )
        return folder, f"store:{given}"
    hub = HUB.fullmatch(given)
    if hub is None and HUB_SHORT.fullmatch(given) and given.split("/", maxsplit=1)[0] not in STORE_FOLDERS:
        hub = HUB.fullmatch(f"hub:{given}")
    if hub is None:
        raise InvalidInput(
            f"{given!r} cannot be resolved here: the orchestrator sees the artifact store and the hub, not your "
            f"machine's folders; 'ratchet run' uploads a local folder and then names it. "
            f"{ALLOWED[0].upper()}{ALLOWED[1:]}",
            field=field,
        )
    name = "--".join(part.replace("/", "--") for part in (hub[1], hub[2]) if part)
    folder = f"models/{name}"
    if _imported(folder, kind, field, store):
        return folder, None
    return folder, f"hub:{hub[1]}@{hub[2]}" if hub[2] else f"hub:{hub[1]}"


def _imported(folder: str, kind: CheckpointKind, field: Field, store: ArtifactStore) -> bool:
    if not store.exists(manifest_file(folder)):
        return False
    _check_kind(folder, kind, field, store)
    return True


def _check_kind(folder: str, kind: CheckpointKind, field: Field, store: ArtifactStore) -> None:
    try:
        manifest = store.manifest(folder)
    except NotFound as error:
        raise InvalidInput(
            f"{folder} is no checkpoint of the artifact store (it has no manifest); {ALLOWED}", field=field
        ) from error
    if manifest.kind != kind:
        raise InvalidInput(f"{folder} is a {manifest.kind}, and {field} has to be a {kind}", field=field)
