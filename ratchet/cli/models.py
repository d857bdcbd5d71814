"""`ratchet generate`, `score`, `policy`, `scorers`, `services`: what serves now."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratchet.cli import output
from ratchet.cli.local import Dir
from ratchet.cli.output import note, print_line

if TYPE_CHECKING:
    from services.contracts.scores import ScoreItem

Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
DEFAULT_DIR = Path(".ratchet")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    for command in (generate, score, policy, scorers, services):
        app.command(rich_help_panel="Models that serve")(command)


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message; - reads it from stdin.")],
    n: Annotated[int, typer.Option(min=1, help="Answers.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print as it is sampled (one answer).")] = False,
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Ask the policy that is served now.

    Example: ratchet generate "Why is the sky blue?" --n 2 --temperature 0.7
    """
    from ratchet.client import RatchetClient
    from services.contracts.conversations import Message

    if stream and (n > 1 or as_json):
        raise typer.BadParameter("one answer can be streamed, as text; leave out --n and --json", param_hint="--stream")
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [*([Message(role="system", content=system)] if system else []), Message(role="user", content=text)]
    with RatchetClient.find(folder) as client:
        if stream:
            for piece in client.stream(messages, temperature=temperature, max_tokens=max_tokens, seed=seed):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            return
        answers = client.generate(messages, n=n, temperature=temperature, max_tokens=max_tokens, seed=seed)
    if as_json:
        output.print_json([vars(answer) for answer in answers])
        return
    for number, answer in enumerate(answers, start=1):
        if n > 1:
            note(f"-- {number} of {n}")
        print_line(answer.text)
    if answers:
        cut = sum(answer.finish_reason == "length" for answer in answers)
        note(
            f"policy {answers[0].policy_version}"
            + (f"; {cut} of {len(answers)} cut off by --max-tokens" if cut else "")
        )


def score(
    prompt: Annotated[str | None, typer.Option(help="The user's message.")] = None,
    response: Annotated[list[str] | None, typer.Option(help="A response to it; repeatable.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="JSONL: prompt (text or messages) with response, responses, or chosen and rejected."),
    ] = None,
    scorer: Annotated[str, typer.Option(help="Name of the scorer ('ratchet scorers').")] = "default",
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Score responses with the reward model: raw logits, higher is better.

    Example: ratchet score --prompt "2 + 2?" --response 4 --response 5
    """
    from ratchet.client import RatchetClient
    from services.contracts.conversations import Message
    from services.contracts.scores import ScoreItem

    if (file is None) == (prompt is None):
        raise typer.BadParameter("give --prompt with --response, or --file", param_hint="--prompt")
    if file is not None:
        items = read_items(file)
    else:
        if not response:
            raise typer.BadParameter("give at least one --response", param_hint="--response")
        items = [ScoreItem(messages=(Message(role="user", content=prompt or ""),), responses=tuple(response))]
    with RatchetClient.find(folder) as client:
        answer = client.score(items, scorer)
    if as_json:
        output.print_json(answer)
        return
    made = output.table("item", "reward", "response", right=("item", "reward"))
    for index, (item, rewards) in enumerate(zip(items, answer.scores, strict=True), start=1):
        for text, reward in zip(item.responses, rewards, strict=True):
            made.add_row(str(index), f"{reward:+.4f}", text.replace("\n", " ")[:80])
    output.print_table(made)
    note(f"scorer {answer.scorer}, {answer.revision}")


def read_items(file: Path) -> list[ScoreItem]:
    """Prompts and responses of a JSONL file. Raises InvalidInput naming the line."""
    from services.contracts.conversations import Message
    from services.contracts.errors import InvalidInput
    from services.contracts.scores import ScoreItem

    if not file.is_file():
        raise InvalidInput(f"{file} is not a file", field="file")
    items: list[ScoreItem] = []
    # Split as bytes: str.splitlines would also cut at U+2028 and the like, which JSON allows inside a text
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            prompt = row["prompt"] if "prompt" in row else row["messages"]
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            given = (
                row["responses"]
                if "responses" in row
                else [row[k] for k in ("response", "chosen", "rejected") if k in row]
            )
            texts = tuple(one if isinstance(one, str) else one[-1]["content"] for one in given)
            items.append(ScoreItem(messages=tuple(Message.model_validate(turn) for turn in turns), responses=texts))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InvalidInput(
                f"{file} line {number}: needs prompt (text or messages) and response, responses, or chosen and "
                f"rejected "
                f"({type(error).__name__}: {str(error).splitlines()[0]})",
                field="file",
            ) from error
    if not items:
        raise InvalidInput(f"{file} has no rows", field="file")
    return items


def policy(
    checkpoint: Annotated[
        str | None, typer.Option("--set", metavar="CHECKPOINT", help="Serve this store checkpoint.")
    ] = None,
    as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:
    """Show the policy that is served, or serve another (a hot swap, proven before it answers).

    Example: ratchet policy --set models/my-sft
    """
    from ratchet.client import RatchetClient

    with RatchetClient.find(folder) as client:
        if checkpoint:
            with output.err.status(f"loading {checkpoint} ..."):
                client.set_policy(checkpoint)
        info = client.policy()
    if as_json:
        output.print_json(info)
        return
    made = output.table("", "")
    made.show_header = False
    for key, value in info.model_dump().items():
        if value is not None:
            made.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    output.print_table(made)


def scorers(as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """List the scorers that serve.

    Example: ratchet scorers
    """
    from ratchet.client import RatchetClient

    with RatchetClient.find(folder) as client:
        found = client.scorers()
    if as_json:
        output.print_json(list(found))
        return
    if not found:
        note("no scorer is loaded; a run loads its own")
        return
    made = output.table("scorer", "kind", "revision", "parameters", "dtype", right=("parameters",))
    for info in found:
        made.add_row(info.name, info.spec.kind, info.revision, f"{info.parameters / 1e6:.1f} M", info.dtype)
    output.print_table(made)


def services(as_json: Json = False, folder: Dir = DEFAULT_DIR) -> None:
    """Show how the services are, as the orchestrator sees them; also of a remote stack. Exit code 0: all are ready.

    Example: ratchet services
    """
    from rich.text import Text

    from ratchet.client import RatchetClient

    with RatchetClient.find(folder) as client:
        found = client.services()
    if as_json:
        output.print_json(list(found))
    else:
        made = output.table("service", "state", "time", "url", "serving", "detail", right=("time",))
        for one in found:
            took = "-" if one.seconds is None else f"{one.seconds * 1000:.0f} ms"
            made.add_row(
                one.name, output.state(one.state), took, one.url or "-", ", ".join(one.serving) or "-",
                Text(one.detail or ""),
            )  # fmt: skip
        output.print_table(made)
    if any(one.state != "ready" for one in found):
        raise typer.Exit(1)
