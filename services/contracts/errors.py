"""One exception tree. Each error knows its HTTP status and its stable code; `platform.problems` maps it to the wire."""

from __future__ import annotations

from typing import ClassVar

from services.contracts.problems import Problem


class RatchetError(Exception):
    """Base of every error Ratchet raises on purpose.

    Args:
        detail: What is wrong, with the offending value, what is allowed, and the remedy.
        field: Dotted name of the field at fault (`sampling.groups.0.n`), when there is one.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, field: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.retry_after_seconds = retry_after_seconds

    def problem(self, instance: str | None = None) -> Problem:
        """This error as an RFC 9457 problem."""
        return Problem(
            type=f"urn:ratchet:problem:{self.code}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            code=self.code,
            field=self.field,
            instance=instance,
        )


class InvalidInput(RatchetError):
    """The request itself is wrong; sending it again cannot help."""

    status, code, title = 422, "invalid-input", "Invalid input"


class Unauthorized(RatchetError):
    """A control route was called without a valid bearer token."""

    status, code, title = 401, "unauthorized", "Missing or wrong token"


class NotFound(RatchetError):
    """The thing named does not exist."""

    status, code, title = 404, "not-found", "Not found"


class Conflict(RatchetError):
    """The request contradicts the present state (same id and another payload, other policy version, …)."""

    status, code, title = 409, "conflict", "Conflict"


class DeviceLeased(Conflict):
    """Somebody else holds the lease on the device; the message names the holder. Over when the lease is."""

    code, title, retryable = "device-leased", "Device is leased", True


class PolicyMismatch(Conflict):
    """The generator serves another policy version than the request names."""

    code, title = "policy-mismatch", "Another policy version is served"


class CheckpointRefused(RatchetError):
    """A checkpoint was refused before any engine saw it (no manifest, wrong hash, pickles, other architecture, …)."""

    status, code, title = 422, "checkpoint-refused", "Checkpoint refused"


class SwapFailed(RatchetError):
    """A policy could not be loaded or did not prove itself; the message says what is served now.

    Retryable, for the engine may have died of something else just then; a job's attempts bound it.
    """

    status, code, title, retryable = 502, "swap-failed", "Policy swap failed", True


class ScoreInvalid(RatchetError):
    """A scorer gave a missing, NaN or infinite score. It is never replaced by a default."""

    status, code, title = 502, "score-invalid", "Invalid score"


class TooLarge(RatchetError):
    """The body is larger than the service accepts; the message names the limit and its setting."""

    status, code, title = 413, "too-large", "Body too large"


class Overloaded(RatchetError):
    """More work than the service accepts; refused at the door."""

    status, code, title, retryable = 429, "overloaded", "Overloaded", True


class Unavailable(RatchetError):
    """A dependency is down or still starting; the message names it."""

    status, code, title, retryable = 503, "unavailable", "Unavailable", True


class ConnectionLost(Unavailable):
    """The connection broke after the request was sent. Whether it took effect is unknown, so it is not sent again."""

    code, title, retryable = "connection-lost", "Connection lost", True


class DeadlineExceeded(RatchetError):
    """A remote call or a stage took longer than its deadline; the message names both."""

    status, code, title, retryable = 504, "deadline-exceeded", "Deadline exceeded", True


class UpstreamFailed(RatchetError):
    """Another service answered with an error that a retry does not mend."""

    status, code, title = 502, "upstream-failed", "Upstream service failed"


class StoreError(RatchetError):
    """The artifact store refused or lost something (path outside, folder without manifest, wrong hash, disk full)."""

    status, code, title = 500, "store", "Artifact store error"


class JobFailed(RatchetError):
    """A job ended in an error; the message carries its cause."""

    status, code, title = 500, "job-failed", "Job failed"


class Fenced(RatchetError):
    """This worker's claim on a job is stale: another worker holds a higher fence. Its result is refused."""

    status, code, title = 409, "fenced", "Stale claim"


class Cancelled(RatchetError):
    """The job was cancelled while it ran."""

    status, code, title = 409, "cancelled", "Cancelled"
