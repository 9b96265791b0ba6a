"""Asks a secateur service to prune language models, and follows the work."""

from .client import Client, JobFailed, Refused
from .job import Job
from .types import Artifact, Event, JobState, Progress, Report, Series, StageRow, Worker

__all__ = [
    "Artifact", "Client", "Event", "Job", "JobFailed", "JobState", "Progress", "Refused", "Report", "Series", "StageRow", "Worker",
]
