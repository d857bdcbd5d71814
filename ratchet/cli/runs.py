"""`ratchet run`, `watch`, `iterate`, `pause`, `resume`, `cancel`, `rollback`, `runs`, `show`, `pairs`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ratchet.cli import output
from ratchet.cli.local import Dir, dir_hint
from ratchet.cli.output import note, print_line

if TYPE_CHECKING:
    from ratchet.cli.recipes import Draft
    from ratchet.client import RatchetClient
    from services.contracts.recipes import PromptSource, Recipe
    from services.contracts.runs import RunView

Run = Annotated[str, typer.Argument(help="Id of the run ('ratchet runs' lists them).")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
DEFAULT_DIR = Path(".ratchet")
SHOWN_CHARACTERS = 300
STORED = "datasets/"
"""Begins the path of a file that is in the store already."""


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    for command in (run, watch, iterate, pause, resume, cancel, rollback, runs, show, pairs):
        app.command(rich_help_panel="Runs")(command)


def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe (TOML); flags override it.", show_default=False)
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="SFT model: folder, OWNER/NAME of the hub, or models/NAME.")
    ] = None,
    reward_model: Annotated[str | None, typer.Option(help="Reward model: folder, hub name, or models/NAME.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts: JSONL or Parquet file, or datasets/...")] = None,
    heldout: Annotated[str | None, typer.Option(help="Held-out prompts. Default: a tenth of the prompts.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations to run now.")] = None,
    prompts_per_iteration: Annotated[int | None, typer.Option(help="Fresh prompts per iteration.")] = None,
    n: Annotated[int | None, typer.Option(help="Responses per prompt, shared evenly by the temperatures.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable. Default: 1.0 and 0.7.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of a response.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of DPO.")] = None,
    train_batch_size: Annotated[int | None, typer.Option(help="Pairs per optimiser step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of prompt and response in training.")] = None,
    beta: Annotated[float | None, typer.Option(help="Of DPO.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts, sampling, pairs and training.")] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip and count broken prompt lines.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the recipe; begins the run's id.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="Id of the run. Default: name and time.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key; repeatable.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return at once; 'ratchet watch' shows it.")] = False,
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Start a run: upload the prompts, put local models into the store, and watch the iterations.

    Example: ratchet run recipes/tiny-cpu.toml --policy ./sft --reward-model ./rm --prompts p.jsonl
    """
    from ratchet.cli.recipes import draft, sampling_groups

    if recipe is None and policy is None and prompts is None:
        raise typer.BadParameter("give a recipe file, or --policy, --reward-model and --prompts", param_hint="RECIPE")
    skip = "skip" if skip_bad_lines else None
    flags = {
        "policy": policy, "reward_model": reward_model, "prompts.path": prompts, "heldout.path": heldout,
        "iterations": iterations, "sampling.prompts_per_iteration": prompts_per_iteration,
        "sampling.groups": sampling_groups(n, temperature or []), "sampling.max_tokens": max_tokens,
        "dpo.learning_rate": learning_rate, "dpo.train_batch_size": train_batch_size, "dpo.max_length": max_length,
        "dpo.beta": beta, "seed": seed, "name": name, "prompts.on_error": skip,
        "heldout.on_error": skip if heldout else None,
    }  # fmt: skip
    made = draft(recipe, flags, settings or [])
    with _client(folder) as client:
        created = client.create_run(resolve(client, made), id=id)
        note(f"run {created.id} is {created.status.value}")
        if detach:
            if as_json:
                output.print_json(created)
            else:
                print_line(created.id)
                note(f"'ratchet watch {created.id}' shows it.{dir_hint(folder)}")
            return
        _watch(client, created.id, as_json=as_json)


def resolve(client: RatchetClient, made: Draft) -> Recipe:
    """The recipe as the orchestrator understands it: models in the store or on the hub, prompts uploaded."""
    from ratchet.cli.recipes import looks_local

    recipe = made.recipe
    changes: dict[str, Any] = {}
    for key in ("policy", "reward_model"):
        value: str = getattr(recipe, key)
        path = made.local_path(key, value)
        if looks_local(value, path):
            changes[key] = client.stage_model(path, field=key)
            note(f"{key} {path} is {changes[key]} in the store")
    prompts = made.local_path("prompts.path", recipe.prompts.path)
    if not recipe.prompts.path.startswith(STORED):
        changes["prompts"] = _upload(client, prompts, recipe.prompts, "prompts")
    if made.split_heldout:
        changes["heldout"] = _hold_out(client, recipe, prompts)
    elif not recipe.heldout.path.startswith(STORED):
        changes["heldout"] = _upload(
            client, made.local_path("heldout.path", recipe.heldout.path), recipe.heldout, "heldout"
        )
    return recipe.model_copy(update=changes)


def _hold_out(client: RatchetClient, recipe: Recipe, prompts: Path) -> PromptSource:
    """Held-out prompts taken from the prompts themselves."""
    from ratchet.cli.recipes import split_heldout
    from services.contracts.errors import InvalidInput

    if recipe.prompts.path.startswith(STORED):
        raise InvalidInput(
            f"prompts are in the store already ({recipe.prompts.path}), so none can be held out here; give --heldout",
            field="heldout",
        )
    with tempfile.TemporaryDirectory(prefix="ratchet-heldout-") as scratch:
        part = Path(scratch) / f"heldout{prompts.suffix}"
        count = split_heldout(prompts, part, recipe.evaluation.max_prompts)
        note(f"no held-out prompts given: {count} of {prompts.name} are held out (always the same ones)")
        return _upload(client, part, recipe.heldout, "heldout")


def _require_file(file: Path, key: str) -> None:
    from services.contracts.errors import InvalidInput

    if not file.is_file():
        raise InvalidInput(
            f"{file} is not a file; give a JSONL or Parquet file, or a store path datasets/...", field=key
        )


def _upload(client: RatchetClient, file: Path, source: PromptSource, key: str) -> PromptSource:
    _require_file(file, key)
    info = client.upload_dataset(file, "prompts", source.on_error)
    note(f"{key}: {info.rows} rows uploaded as {info.path}")
    for line in info.skipped[:5]:
        note(f"  skipped {line}")
    if info.skipped_count > len(info.skipped[:5]):
        note(f"  {info.skipped_count} lines skipped in all")
    return source.model_copy(update={"path": info.path})


def watch(id: Run, as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """Watch a run: stages with progress, and the iterations decided. Ctrl-C leaves it running.

    Example: ratchet watch tiny-cpu-20261124-0712-ab12
    """
    with _client(folder) as client:
        _watch(client, id, as_json=as_json)


def _watch(client: RatchetClient, id: str, *, as_json: bool) -> None:
    from ratchet.cli.watch import watch_run

    view = client.wait(id) if as_json else watch_run(client, id)
    if as_json:
        output.print_json(view)
    elif not output.out.is_terminal:
        print_run(view, reasons=False)
    if view.status.value in ("failed", "cancelled"):
        raise typer.Exit(1)


def iterate(
    id: Run,
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="How many more iterations.")] = 1,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not watch.")] = False,
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Run the next iterations of a run.

    Example: ratchet iterate my-run -k 2
    """
    with _client(folder) as client:
        view = client.trigger(id, count)
        if detach:
            _brief(view, as_json=as_json)
        else:
            _watch(client, id, as_json=as_json)


def pause(id: Run, as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """Enqueue nothing more; what runs, ends.

    Example: ratchet pause my-run
    """
    with _client(folder) as client:
        _brief(client.pause(id), as_json=as_json)


def resume(id: Run, as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """Go on after a pause, a cancellation or a failure.

    Example: ratchet resume my-run
    """
    with _client(folder) as client:
        _brief(client.resume(id), as_json=as_json)


def cancel(id: Run, as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """Stop what runs, within seconds. 'ratchet resume' can go on later.

    Example: ratchet cancel my-run
    """
    with _client(folder) as client:
        _brief(client.cancel(id), as_json=as_json)


def rollback(
    id: Run,
    to: Annotated[
        int, typer.Option("--to", "-t", min=0, help="Iteration whose policy becomes the incumbent; 0: the initial one.")
    ],
    reason: Annotated[str, typer.Option("--reason", "-m", help="Kept in the run's record.")] = "by hand",
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Set the incumbent back, from the next iteration on.

    Example: ratchet rollback my-run --to 1 -m "answers grew too long"
    """
    with _client(folder) as client:
        _brief(client.rollback(id, to, reason), as_json=as_json)


def runs(as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """List all runs, newest first.

    Example: ratchet runs
    """
    with _client(folder) as client:
        found = client.runs("all" if as_json else "none")
    if as_json:
        output.print_json(list(found))
        return
    if not found:
        note("there are no runs yet; 'ratchet run --help' shows how to start one")
        return
    made = output.table("run", "status", "decided", "asked", "incumbent", "created", right=("decided", "asked"))
    for view in found:
        made.add_row(
            view.id, output.state(view.status.value), str(view.iterations_decided), str(view.iterations_asked),
            view.incumbent or "-", view.created_at[:19].replace("T", " "),
        )  # fmt: skip
    output.print_table(made)


def show(id: Run, as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """Show a run: each iteration's decision, figures, reasons and times.

    Example: ratchet show my-run --json
    """
    with _client(folder) as client:
        view = client.run(id)
    if as_json:
        output.print_json(view)
    else:
        print_run(view, reasons=True)


def print_run(view: RunView, *, reasons: bool) -> None:
    """A run on stdout."""
    from ratchet.cli import views

    print_line(views.headline(view))
    if view.problem:
        print_line(Text(f"{view.problem.title}: {view.problem.detail}", style="red"))
    iteration = views.current_iteration(view)
    if iteration is not None and iteration.record is None:
        print_line()
        print_line(f"iteration {iteration.iteration}")
        output.print_table(views.stages_table(iteration))
    if made := views.iterations_table(view):
        print_line()
        output.print_table(made)
    if reasons:
        for one in view.iterations:
            if one.record:
                print_line()
                for line in views.decision_lines(one.record):
                    print_line(line)


def pairs(
    id: Run,
    iteration: Annotated[int, typer.Option("--iteration", "-t", min=1, help="Which iteration.")],
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 5,
    offset: Annotated[int, typer.Option(min=0)] = 0,
    sort: Annotated[str, typer.Option(help="row, margin, chosen_reward, rejected_reward, chosen_tokens, ...")] = "row",
    descending: Annotated[bool, typer.Option("--descending", help="Largest first.")] = False,
    search: Annotated[str | None, typer.Option(help="Text in prompt, chosen or rejected, in any case.")] = None,
    min_margin: Annotated[float | None, typer.Option()] = None,
    max_margin: Annotated[float | None, typer.Option()] = None,
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Read the preference pairs of an iteration.

    Example: ratchet pairs my-run -t 1 --limit 3 --sort margin --descending
    """
    from pydantic import ValidationError

    from services.contracts.browsing import PairQuery

    try:
        query = PairQuery.model_validate(
            {"sort": sort, "descending": descending, "search": search, "min_margin": min_margin,
             "max_margin": max_margin}
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(first["msg"], param_hint=f"--{name}") from error
    with _client(folder) as client:
        page = client.pairs(id, iteration, offset, limit, query)
    if as_json:
        output.print_json(page)
        return
    for place, (number, pair) in enumerate(zip(page.numbers, page.rows, strict=True), start=page.offset + 1):
        found = f"{place} of {page.total}"
        print_line(Text(f"pair {number}  ({found})  prompt {pair.prompt_id}  margin {pair.margin:.3f}", style="bold"))
        for turn in pair.prompt:
            _block(turn.role, turn.content)
        _block(f"chosen   {pair.chosen_reward:+.3f}", pair.chosen[-1].content, "green")
        _block(f"rejected {pair.rejected_reward:+.3f}", pair.rejected[-1].content, "red")
        print_line()
    if not page.rows:
        note(f"{page.total} pairs of iteration {iteration} are found; none from {offset} on")


def _block(label: str, text: str, style: str = "") -> None:
    cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
    print_line(Text.assemble((f"  {label:<16} ", style or "dim"), cut.replace("\n", "\n" + " " * 19)))


def _brief(view: RunView, *, as_json: bool) -> None:
    from ratchet.cli import views

    if as_json:
        output.print_json(view)
    else:
        print_line(views.headline(view))


def _client(folder: Path) -> RatchetClient:
    from ratchet.client import RatchetClient

    return RatchetClient.find(folder)
