"""What the service tells. Each class is the schema of the same name in the OpenAPI document, as far as it is named here; more
fields are kept as they come."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict

JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")


class Told(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Progress(Told):
    stage: str
    task: str
    done: int
    total: int
    unit: str
    fraction: float
    eta_s: int | None = None


class Failure(Told):
    kind: str
    stage: str | None = None
    message: str


class StageRow(Told):
    stage: str
    state: str
    reused: bool
    attempt: int
    started_at: datetime
    finished_at: datetime | None = None
    duration_ms: int | None = None


class JobSummary(Told):
    id: UUID
    name: str | None = None
    labels: dict[str, str] = {}
    state: JobState
    wish: str | None = None
    priority: int
    attempt: int
    crashes: int
    progress: Progress | None = None
    failure: Failure | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    retry_of: UUID | None = None
    last_seq: int


class Event(Told):
    seq: int
    attempt: int
    at: datetime
    event: str


class Point(Told):
    step: int
    value: float
    at: datetime


class Series(Told):
    stage: str
    key: str
    points: list[Point]


class Artifact(Told):
    path: str
    size_bytes: int
    sha256: str
    url: str
    created_at: datetime


class Worker(Told):
    id: UUID
    host: str
    device: str
    version: str
    busy: bool
    job_id: UUID | None = None
    started_at: datetime
    seen_at: datetime


class LayerSelection(Told):
    dropped: list[int]
    strategy: str
    score: float


class Perplexity(Told):
    corpus: str
    value: float
    stderr: float = 0.0


class TaskScore(Told):
    task: str
    acc: float
    stderr: float
    n: int


class Scores(Told):
    layer_count: int
    parameters: int
    size_bytes: int
    perplexity: list[Perplexity]
    tasks: list[TaskScore]


class EvalReport(Told):
    base: Scores
    pruned: Scores
    healed: Scores | None = None


class Verdict(Told):
    decision: Literal["ship", "review", "reject"]
    checkpoint: str
    reasons: list[str]


class Report(Told):
    secateur_version: str
    selection: LayerSelection
    eval: EvalReport
    verdict: Verdict | None = None
    remarks: list[str]
