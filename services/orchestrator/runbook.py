"""What the artifact store knows of the runs: records, what people asked of them, and decided iterations."""

from __future__ import annotations

import threading

from services.contracts import layout
from services.contracts.errors import NotFound, RatchetError
from services.contracts.runs import IterationRecord, RunControl, RunRecord
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore

log = get_logger(__name__)


class Runbook:
    """The runs of the store, remembered where they cannot change. Blocks on I/O: call it in a thread.

    `run.json` and `iteration.json` are written once and so read once; `control.json` is written by this process only,
    and read again at each sweep. Requests and the conductor read in threads of their own, hence the lock.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self._lock = threading.RLock()
        self._records: dict[str, RunRecord] = {}
        self._controls: dict[str, RunControl] = {}
        self._decided: dict[str, dict[int, IterationRecord]] = {}
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

    def decided(self, run: str) -> dict[int, IterationRecord]:
        """The decided iterations, by number, as far as they follow one another from the baseline on."""
        with self._lock:
            known = self._decided.setdefault(run, {})
            while (record := self._read_iteration(run, len(known))) is not None:
                known[len(known)] = record
            return dict(known)

    def _read_iteration(self, run: str, iteration: int) -> IterationRecord | None:
        path = layout.iteration_file(run, iteration)
        if not self.store.exists(path):
            return None
        return self.store.read_model(path, IterationRecord)
