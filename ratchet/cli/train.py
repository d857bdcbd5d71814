"""`ratchet train sft | reward-model | import`: training jobs, watched to their checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.live import Live
from rich.text import Text

from ratchet.cli import output
from ratchet.cli.local import Dir
from ratchet.cli.output import note, print_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from ratchet.client import RatchetClient
    from services.contracts.jobs import Job
    from services.contracts.training import TrainingJob, TrainingProgress

app = typer.Typer(
    help="Train or import a model: sft, reward-model, import.", no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
DEFAULT_DIR = Path(".ratchet")

Base = Annotated[str, typer.Option(help="Model to start from: folder, OWNER/NAME of the hub, or a store checkpoint.")]
Data = Annotated[str, typer.Option(help="JSONL or Parquet file, or datasets/...")]
ModelName = Annotated[str, typer.Option("--name", help="The checkpoint becomes models/NAME.")]
Config = Annotated[Path | None, typer.Option(help="TOML with the settings; flags override it.")]
Epochs = Annotated[float | None, typer.Option()]
BatchSize = Annotated[int | None, typer.Option(help="Examples per optimiser step.")]
MicroBatchSize = Annotated[int | None, typer.Option(help="Examples per forward pass; divides --batch-size.")]
LearningRate = Annotated[float | None, typer.Option()]
MaxLength = Annotated[int | None, typer.Option(help="Most tokens of prompt and response.")]
Seed = Annotated[int | None, typer.Option()]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; repeatable.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Queue it and return.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


@app.command()
def sft(
    base: Base, data: Data, name: ModelName, config: Config = None, epochs: Epochs = None, batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None, learning_rate: LearningRate = None, max_length: MaxLength = None,
    seed: Seed = None, settings: Settings = None, detach: Detach = False, as_json: Json = False,
    folder: Dir = DEFAULT_DIR,
) -> None:  # fmt: skip
    """Supervised fine-tuning on messages, or prompt and completion.

    Example: ratchet train sft --base ./tiny --data d.jsonl --name s --config sft.toml
    """
    from services.contracts.training import SftConfig, SftJob

    made = _config(SftConfig, config, settings, num_train_epochs=epochs, train_batch_size=batch_size,
                   micro_batch_size=micro_batch_size, learning_rate=learning_rate, max_length=max_length,
                   seed=seed)  # fmt: skip

    def job(client: RatchetClient) -> TrainingJob:
        return SftJob(
            start=_checkpoint(client, base, "policy"),
            data=_data(client, data, "data"),
            config=made,
            output=_output(name),
        )

    _train(job, folder, detach=detach, as_json=as_json)


@app.command("reward-model")
def reward_model(
    base: Base, data: Data, name: ModelName,
    heldout: Annotated[str | None, typer.Option(help="Pairs not trained on; their accuracy is reported.")] = None,
    config: Config = None, epochs: Epochs = None, batch_size: BatchSize = None, micro_batch_size: MicroBatchSize = None,
    learning_rate: LearningRate = None, max_length: MaxLength = None, seed: Seed = None, settings: Settings = None,
    detach: Detach = False, as_json: Json = False, folder: Dir = DEFAULT_DIR,
) -> None:  # fmt: skip
    """A Bradley-Terry reward model on prompt, chosen, rejected.

    Example: ratchet train reward-model --base models/s --data pairs.jsonl --name rm --config reward-model.toml
    """
    from services.contracts.training import RewardModelConfig, RewardModelJob

    made = _config(RewardModelConfig, config, settings, num_train_epochs=epochs, train_batch_size=batch_size,
                   micro_batch_size=micro_batch_size, learning_rate=learning_rate, max_length=max_length,
                   seed=seed)  # fmt: skip

    def job(client: RatchetClient) -> TrainingJob:
        return RewardModelJob(
            start=_checkpoint(client, base, "policy"), data=_data(client, data, "data"),
            heldout=_data(client, heldout, "heldout") if heldout else None, config=made, output=_output(name),
        )  # fmt: skip

    _train(job, folder, detach=detach, as_json=as_json)


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="Folder, or OWNER/NAME[@REVISION] of the hub.")],
    kind: Annotated[str, typer.Option(help="policy or reward_model.")],
    name: ModelName,
    detach: Detach = False, as_json: Json = False, folder: Dir = DEFAULT_DIR,
) -> None:  # fmt: skip
    """Bring a Hugging Face model into the store: checked, safetensors only, with probes and manifest.

    Example: ratchet train import ./my-model --kind policy --name my-sft
    """
    if kind not in ("policy", "reward_model"):
        raise typer.BadParameter(f"{kind!r} is neither policy nor reward_model", param_hint="--kind")
    model_kind: Literal["policy", "reward_model"] = "policy" if kind == "policy" else "reward_model"

    def job(client: RatchetClient) -> TrainingJob:
        return _import_job(client, source, model_kind, _output(name))

    _train(job, folder, detach=detach, as_json=as_json)


def _config(model: type[Any], file: Path | None, settings: list[str] | None, **flags: Any) -> Any:
    """The job's settings of a TOML, flags and `--set`, checked before anything is uploaded."""
    from ratchet.cli.recipes import check, parse_setting, put, read_toml

    data = read_toml(file) if file else {}
    for key, value in [*flags.items(), *(parse_setting(one) for one in settings or [])]:
        if value is not None:
            put(data, key, value)
    return check(data, model, str(file) if file else "the flags")


def _output(name: str) -> str:
    import re

    from services.contracts.errors import InvalidInput

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InvalidInput(f"{name!r} is not a name; letters, digits, '.', '_' and '-' are allowed", field="name")
    return f"models/{name}"


def _data(client: RatchetClient, given: str, field: str) -> str:
    if given.startswith("datasets/"):
        return given
    info = client.upload_dataset(Path(given), "any")
    note(f"{field}: {info.rows} rows uploaded as {info.path}")
    return info.path


def _checkpoint(client: RatchetClient, given: str, kind: Literal["policy", "reward_model"]) -> str:
    """A store checkpoint: the given one, or an import of a folder or hub model (done once)."""
    if given.startswith(("models/", "runs/")) and not Path(given).exists():
        return given
    stem = given.rstrip("/").replace("@", "--").replace("/", "--")
    path = Path(given).expanduser()
    output_path = None if path.is_dir() else f"models/{stem.removeprefix('hub:')}"
    job = _import_job(client, given, kind, output_path)
    note(f"importing {given} as {job.output}")
    return _wait(client, client.submit_job(job).id).checkpoint


def _import_job(
    client: RatchetClient, given: str, kind: Literal["policy", "reward_model"], output_path: str | None
) -> Any:
    from services.contracts.errors import InvalidInput
    from services.contracts.training import ImportModelJob

    path = Path(given).expanduser()
    if path.is_dir() or given.startswith(("/", "./", "../", "~")):
        staged = client.stage_model(path, field="base")
        source, default = f"store:{staged}", f"models/{staged.removeprefix('staging/')}"
    elif given.startswith("staging/"):
        source, default = f"store:{given}", f"models/{given.removeprefix('staging/')}"
    elif "/" in given or given.startswith("hub:"):
        source, default = given if given.startswith("hub:") else f"hub:{given}", ""
    else:
        raise InvalidInput(f"{given!r} is not a folder here, nor OWNER/NAME of the hub, nor models/NAME", field="base")
    return ImportModelJob(model_kind=kind, source=source, output=output_path or default)


def _train(build: Callable[[RatchetClient], TrainingJob], folder: Path, *, detach: bool, as_json: bool) -> None:
    from ratchet.client import RatchetClient

    with RatchetClient.find(folder) as client:
        job = client.submit_job(build(client))
        note(f"job {job.id} is {job.state.value}")
        if detach:
            output.print_json(job) if as_json else print_line(job.id)
            return
        if job.state.value in ("failed", "cancelled"):
            note("it ended so before; trying again from its last save")
            job = client.retry_job(job.id)
        try:
            result = _wait(client, job.id)
        except KeyboardInterrupt:
            note(f"\nThe job goes on in the trainer; the same command watches it again. Its id: {job.id}")
            raise
    if as_json:
        output.print_json(result)
        return
    note(f"done in {output.seconds(result.seconds)}")
    for key, value in sorted(result.metrics.items()):
        note(f"  {key:<24} {value:.4g}")
    print_line(result.checkpoint)


def _wait(client: RatchetClient, job_id: str) -> Any:
    """Wait for a job, showing its progress: live on a terminal, a line per tenth elsewhere."""
    if output.err.is_terminal:
        with Live(console=output.err, refresh_per_second=8) as live:
            return client.wait_job(job_id, lambda job, progress: live.update(Text(progress_line(job, progress))))
    said: list[str] = []

    def line(job: Job, progress: TrainingProgress | None) -> None:
        share = int(10 * progress.step / progress.total_steps) if progress and progress.total_steps else 0
        mark = f"{job.state.value} {(progress.waiting or progress.phase) if progress else ''} {share}"
        if said[-1:] != [mark]:
            said.append(mark)
            note(progress_line(job, progress))

    return client.wait_job(job_id, line)


def progress_line(job: Job, progress: TrainingProgress | None) -> str:
    """`sft  training  step 12/80  loss 1.231  accuracy 71 %  900 tokens/s  20 s left`."""
    if progress is None or job.state.final or job.state.value == "queued":
        return f"{job.kind}  {job.state.value}"
    parts = [job.kind, progress.waiting or progress.phase]
    if progress.total_steps:
        parts.append(f"step {progress.step}/{progress.total_steps}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.accuracy is not None:
        parts.append(f"accuracy {output.percent(progress.accuracy)}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.seconds_left is not None and progress.phase == "training":
        parts.append(f"{output.seconds(progress.seconds_left)} left")
    if progress.warning:
        parts.append(progress.warning)
    return "  ".join(parts)
