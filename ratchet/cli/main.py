"""The `ratchet` command: every command is registered here."""

from __future__ import annotations

import typer

from ratchet.cli import local, models, runs, train
from ratchet.cli.output import RatchetGroup

app = typer.Typer(
    name="ratchet",
    cls=RatchetGroup,
    help="Online iterative RLHF: sample, score, pair, train, prove, promote.",
    epilog="Start with:  ratchet up -d   then   ratchet run recipes/tiny-cpu.toml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs.register(app)
models.register(app)
app.add_typer(train.app, name="train", rich_help_panel="Models that serve")
local.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        typer.echo(installed("ratchet-rlhf"))
    except PackageNotFoundError:  # run from a checkout that is not installed
        typer.echo("not installed")


def run() -> None:
    """Entry point of `python -m ratchet`."""
    app(prog_name="ratchet")
