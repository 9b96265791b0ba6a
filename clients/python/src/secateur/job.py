"""One job: watched, changed, and its results fetched."""

from __future__ import annotations

import hashlib
import html
import json
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from pydantic import PrivateAttr

from .client import Client, JobFailed, Refused, check
from .types import ENDED, Artifact, Event, JobSummary, Report, Series, StageRow


class Job(JobSummary):
    spec: dict[str, Any]
    stages: list[StageRow]
    jobs_ahead: int | None = None
    _client: Client = PrivateAttr()

    @classmethod
    def of(cls, client: Client, told: dict[str, Any]) -> Job:
        job = cls.model_validate(told)
        job._client = client
        return job

    @property
    def at(self) -> str:
        return f"/v1/jobs/{self.id}"

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def refresh(self, wait_s: int = 0) -> Job:
        """Looks again; with `wait_s` the answer comes when the job has ended, or after that time."""
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        told = self._client.call("GET", self.at, headers=headers).json()
        return self._take(Job.of(self._client, told))

    def _take(self, other: Job) -> Job:
        for name in Job.model_fields:
            setattr(self, name, getattr(other, name))
        return self

    def _change(self, what: str) -> Job:
        return self._take(Job.of(self._client, self._client.call("POST", f"{self.at}/{what}").json()))

    def cancel(self) -> Job:
        return self._change("cancel")

    def pause(self) -> Job:
        return self._change("pause")

    def resume(self) -> Job:
        return self._change("resume")

    def retry(self) -> Job:
        """A new job that tries this one again, from what it had recorded."""
        key = {"Idempotency-Key": str(uuid.uuid4())}
        return Job.of(self._client, self._client.call("POST", f"{self.at}/retry", headers=key).json())

    def delete(self) -> None:
        self._client.call("DELETE", self.at)

    def wait(self, timeout_s: float | None = None, progress: bool | None = None) -> Job:
        """Waits until the job has ended, with a line of progress on a terminal. Raises `JobFailed` if it did not succeed, and
        `TimeoutError`, the job going on, after `timeout_s`."""
        shown = sys.stderr.isatty() if progress is None else progress
        begun = time.monotonic()
        while not self.ended:
            left = None if timeout_s is None else timeout_s - (time.monotonic() - begun)
            if left is not None and left <= 0:
                raise TimeoutError(f"the job {self.id} is {self.state} after {timeout_s} s")
            if shown:
                print("\r\033[K" + self.line(), end="", file=sys.stderr, flush=True)
            # Short while a person looks on, else as long as the service answers late.
            self.refresh(wait_s=max(1, min(1 if shown else 50, int(left) if left is not None else 50)))
        if shown:
            print("\r\033[K" + self.line(), file=sys.stderr)
        if self.state != "succeeded":
            raise JobFailed(self)
        return self

    def line(self) -> str:
        """How it stands, in one line."""
        if self.progress is None:
            ahead = f", {self.jobs_ahead} before it" if self.jobs_ahead else ""
            return f"{self.name or self.id}: {self.state}{ahead}"
        p = self.progress
        full = round(p.fraction * 24)
        left = "" if p.eta_s is None else f", {p.eta_s} s left"
        return f"{self.name or self.id}: {p.stage} [{'=' * full}{' ' * (24 - full)}] {p.fraction:4.0%} {p.task}{left}"

    def events(self, after: int = 0) -> Iterator[Event]:
        """What happened and what happens, until the job has ended; goes on where a line broke."""
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            try:
                with self._client.http.stream("GET", f"{self.at}/events", headers=headers) as answer:
                    check(answer)
                    for name, data in _blocks(answer.iter_lines()):
                        if name == "end":
                            return
                        if name != "progress":
                            event = Event.model_validate_json(data)
                            after = event.seq
                            yield event
            except httpx.TransportError:
                pass
            except Refused as refused:
                if refused.status < 500:
                    raise
            time.sleep(1)

    def series(self, key: str | None = None) -> list[Series]:
        asked = {"key": key} if key else {}
        page = self._client.call("GET", f"{self.at}/metrics", params=asked).json()
        return [Series.model_validate(row) for row in page["data"]]

    def report(self) -> Report:
        return Report.model_validate(self._client.call("GET", f"{self.at}/report").json())

    def artifacts(self) -> list[Artifact]:
        page = self._client.call("GET", f"{self.at}/artifacts").json()
        return [Artifact.model_validate(row) for row in page["data"]]

    def download(self, to: str | Path, only: str = "") -> list[Path]:
        """The files whose path begins with `only`, each checked by its sha256. What is there already is not fetched again, and a
        part of a file is gone on with."""
        wanted = [a for a in self.artifacts() if a.path.startswith(only)]
        return [self._fetch(artifact, Path(to) / artifact.path) for artifact in wanted]

    def _fetch(self, artifact: Artifact, target: Path) -> Path:
        if ".." in Path(artifact.path).parts or Path(artifact.path).is_absolute():
            raise ValueError(f"{artifact.path} leaves the directory")
        if target.exists() and _sha256(target) == artifact.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        for again in (False, True):
            have = part.stat().st_size if part.exists() and not again else 0
            headers = {"Range": f"bytes={have}-", "If-Range": f'"{artifact.sha256}"'} if 0 < have < artifact.size_bytes else {}
            if have != artifact.size_bytes or again:
                with self._client.http.stream("GET", artifact.url, params={"proxy": 1}, headers=headers) as answer:
                    check(answer)
                    with part.open("ab" if answer.status_code == 206 else "wb") as file:
                        for chunk in answer.iter_bytes():
                            file.write(chunk)
            if _sha256(part) == artifact.sha256:
                part.replace(target)
                return target
        raise OSError(f"{artifact.path} is not what its sha256 says, twice")

    def _repr_html_(self) -> str:
        """For notebooks."""
        text = html.escape
        parts = [f"<b>{text(self.name or str(self.id))}</b> <code>{text(self.state)}</code>"]
        if self.failure:
            parts.append(f"<p>{text(self.failure.message)}</p>")
        rows = "".join(
            f"<tr><td>{text(s.stage)}<td>{text(s.state)}<td>{'reused' if s.reused else f'{s.duration_ms or 0} ms'}" for s in self.stages
        )
        parts.append(f"<table><tr><th>stage<th>state<th>took{rows}</table>" if rows else "")
        if self.state == "succeeded":
            parts.append(_scores(self.report()))
        return "".join(parts)


def _scores(report: Report) -> str:
    scored = {name: getattr(report.eval, name) for name in ("base", "pruned", "healed") if getattr(report.eval, name)}
    rows = [("layers", [s.layer_count for s in scored.values()]), ("parameters", [f"{s.parameters:,}" for s in scored.values()])]
    for i, measured in enumerate(report.eval.base.perplexity):
        rows.append((f"perplexity, {measured.corpus}", [f"{s.perplexity[i].value:.4g}" for s in scored.values()]))
    for i, task in enumerate(report.eval.base.tasks):
        rows.append((f"accuracy, {task.task}", [f"{s.tasks[i].acc:.1%}" for s in scored.values()]))
    head = "".join(f"<th>{name}" for name in scored)
    body = "".join(f"<tr><td>{html.escape(name)}" + "".join(f"<td>{v}" for v in values) for name, values in rows)
    verdict = f"<p>Verdict: <b>{html.escape(report.verdict.decision)}</b></p>" if report.verdict else ""
    return f"<table><tr><th>{head}{body}</table>{verdict}"


def _blocks(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Name and data of server-sent events."""
    name, data = "message", ""
    for line in lines:
        if not line:
            if data:
                json.loads(data)
                yield name, data
            name, data = "message", ""
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].strip()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
