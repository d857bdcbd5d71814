"""What the artifact store knows of the runs: records, what people asked of them, decided iterations, judgements."""

from __future__ import annotations

import threading

from services.contracts import layout
from services.contracts.errors import Conflict, InvalidInput, NotFound, RatchetError
from services.contracts.judgements import Judgement, Verdict
from services.contracts.runs import IterationRecord, RunControl, RunRecord
from services.orchestrator.clock import now_iso
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore

log = get_logger(__name__)


class Runbook:
    """The runs of the store, remembered where they cannot change. Blocks on I/O: call it in a thread.

    `run.json` and `iteration.json` are written once and so read once; `control.json` is written by this process only,
    and read again at each sweep. Judgements are read once, and those recorded here are added. Requests
    and the conductor read in threads of their own, hence the lock.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self._lock = threading.RLock()
        self._records: dict[str, RunRecord] = {}
        self._controls: dict[str, RunControl] = {}
        self._decided: dict[str, dict[int, IterationRecord]] = {}
        self._judgements: dict[str, dict[int, tuple[Judgement, ...]]] = {}
        self._unreadable: dict[str, str] = {}

    def refresh(self) -> None:
        """Look for runs and controls in the store again. A run that cannot be read is logged and left out."""
        for name in self.store.list("runs"):
            try:
                with self._lock:
                    self.record(name)
                    self._controls[name] = self._read_control(name)
                    self._unreadable.pop(name, None)
            except NotFound:
                continue  # being created, or its creation was cut off: run.json is what makes a run
            except RatchetError as error:
                if self._unreadable.get(name) != error.detail:
                    log.error("run_unreadable", run=name, problem=error.detail)
                self._unreadable[name] = error.detail

    def ids(self) -> list[str]:
        """All runs, oldest first."""
        return sorted(self._records, key=lambda run: (self._records[run].created_at, run))

    def record(self, run: str) -> RunRecord:
        """`run.json`. Raises NotFound."""
        if run not in self._records:
            try:
                self._records[run] = self.store.read_model(layout.run_file(run), RunRecord)
            except NotFound as error:
                raise NotFound(f"there is no run {run!r}; GET /v1/runs lists them", field="id") from error
        return self._records[run]

    def control(self, run: str) -> RunControl:
        """What has been asked of the run."""
        with self._lock:
            if run not in self._controls:
                self._controls[run] = self._read_control(run)
            return self._controls[run]

    def _read_control(self, run: str) -> RunControl:
        try:
            return self.store.read_model(layout.control_file(run), RunControl)
        except NotFound:
            return RunControl(iterations=self.record(run).recipe.iterations)

    def reread_control(self, run: str) -> RunControl:
        """`control`, as the store has it now: another orchestrator, waiting to take over, may have changed it."""
        with self._lock:
            self._controls[run] = self._read_control(run)
            return self._controls[run]

    def write_control(self, run: str, control: RunControl) -> None:
        """Record what people ask of the run, before anything else happens."""
        with self._lock:
            self.store.replace_model(layout.control_file(run), control)
            self._controls[run] = control

    def check_asked(self, run: str, iteration: int) -> None:
        """Raises NotFound when there is no such run, or it was not asked for this iteration."""
        asked = max(self.control(run).iterations, len(self.decided(run)) - 1)
        if iteration > asked:
            raise NotFound(f"run {run} has iterations 0 to {asked}, not {iteration}", field="iteration")

    def decided(self, run: str) -> dict[int, IterationRecord]:
        """The decided iterations, by number, as far as they follow one another from the baseline on."""
        with self._lock:
            known = self._decided.setdefault(run, {})
            while (record := self._read_iteration(run, len(known))) is not None:
                known[len(known)] = record
            return dict(known)

    def judgements(self, run: str) -> dict[int, tuple[Judgement, ...]]:
        """What judges say of the decided iterations, by iteration, each in the order of the judges' names."""
        with self._lock:
            known = self._judgements.setdefault(run, {})
            for iteration in self.decided(run):
                if iteration not in known:
                    known[iteration] = self._read_judgements(run, iteration)
            return dict(known)

    def judge(self, run: str, iteration: int, judge: str, verdict: Verdict) -> tuple[Judgement, bool]:
        """Record a judge's verdict on a decided iteration, once. Returns whether it is new.

        Raises:
            NotFound: no such run or iteration. InvalidInput: it is not decided yet.
            Conflict: the judge has given another verdict.
        """
        self.check_asked(run, iteration)
        if iteration not in self.decided(run):
            raise InvalidInput(
                f"iteration {iteration} of run {run} is not decided yet, so it has no policy to judge; wait for its "
                "decision",
                field="iteration",
            )
        path = layout.judgement_file(run, iteration, judge)
        given = Judgement(judge=judge, verdict=verdict, judged_at=now_iso())
        with self._lock:
            new = self.store.publish_model(path, given)
            kept = given if new else self.store.read_model(path, Judgement)
            others = [one for one in self.judgements(run).get(iteration, ()) if one.judge != judge]
            self._judgements[run][iteration] = tuple(sorted((*others, kept), key=lambda one: one.judge))
        if kept.verdict != verdict:
            raise Conflict(
                f"{judge} has judged iteration {iteration} of run {run} already, at {kept.judged_at} with a win rate "
                f"of {kept.verdict.win_rate:g}, and a judgement is not changed; judge under another name",
                field="judge",
            )
        return kept, new

    def _read_judgements(self, run: str, iteration: int) -> tuple[Judgement, ...]:
        found: list[Judgement] = []
        for name in self.store.list(layout.judgements_folder(run, iteration)):
            file = layout.judgement_file(run, iteration, name.removesuffix(".json"))
            try:
                found.append(self.store.read_model(file, Judgement))
            except RatchetError as error:  # it is only shown, so the run is not held up
                log.error("judgement_unreadable", run=run, iteration=iteration, problem=error.detail)
        return tuple(sorted(found, key=lambda one: one.judge))

    def _read_iteration(self, run: str, iteration: int) -> IterationRecord | None:
        path = layout.iteration_file(run, iteration)
        if not self.store.exists(path):
            return None
        return self.store.read_model(path, IterationRecord)
