"""Job queue, workers and event streams over Redis; see `docs/architecture.md`, section Jobs."""

from services.platform.jobs.connection import connect
from services.platform.jobs.context import Handler, JobContext
from services.platform.jobs.events import EventStream
from services.platform.jobs.queue import Beat, JobQueue
from services.platform.jobs.records import Claim
from services.platform.jobs.settings import JobSettings
from services.platform.jobs.worker import Worker

__all__ = ["Beat", "Claim", "EventStream", "Handler", "JobContext", "JobQueue", "JobSettings", "Worker", "connect"]
