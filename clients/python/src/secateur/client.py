"""The door: one connection to one service."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from .types import JobState, JobSummary, Worker

if TYPE_CHECKING:
    from .job import Job

TRIES = 5


class Refused(Exception):
    """The service does not do what was asked. `errors` names everything that is wrong and where."""

    def __init__(self, status: int, problem: Mapping[str, Any]):
        self.status = status
        self.code: str = problem.get("code", "")
        self.errors: list[dict[str, str]] = list(problem.get("errors", []))
        self.request_id: str = problem.get("request_id", "")
        told = [problem.get("detail") or problem.get("title") or f"status {status}"]
        if len(self.errors) > 1:
            told += [f"  {e['pointer'] or '/'}: {e['message']}" for e in self.errors]
        super().__init__("\n".join(told))


class JobFailed(Exception):
    """A job that was waited for has not succeeded."""

    def __init__(self, job: Job):
        self.job = job
        why = f": {job.failure.message}" if job.failure else ""
        super().__init__(f"the job {job.id} is {job.state}{why}")


class Client:
    """A service. `api_key` comes from SECATEUR_API_KEY when it is not given."""

    def __init__(self, url: str = "http://127.0.0.1:8080", api_key: str | None = None, timeout: float = 65.0):
        key = api_key or os.environ.get("SECATEUR_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        """One request. It is sent again where that is safe: when the service is away, and the request changes nothing or
        carries an Idempotency-Key."""
        safe = method == "GET" or "Idempotency-Key" in more.get("headers", {})
        for attempt in range(TRIES):
            last = attempt == TRIES - 1 or not safe
            try:
                answer = self.http.request(method, path, **more)
            except httpx.TransportError:
                if last:
                    raise
            else:
                if answer.status_code not in (502, 503, 504) or last:
                    return check(answer)
            time.sleep(min(2.0**attempt, 10.0) / 2)
        raise AssertionError("unreachable")

    def submit(self, spec: Mapping[str, Any] | None = None, **fields: Any) -> Job:
        """Asks for a pruned model: a whole spec, fields of one, or both."""
        from .job import Job

        key = {"Idempotency-Key": str(uuid.uuid4())}
        answer = self.call("POST", "/v1/jobs", json={**(spec or {}), **fields}, headers=key)
        return Job.of(self, answer.json())

    def job(self, id: str | uuid.UUID) -> Job:
        from .job import Job

        return Job.of(self, self.call("GET", f"/v1/jobs/{id}").json())

    def jobs(
        self, state: JobState | None = None, name: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Iterator[JobSummary]:
        """All jobs that fit, newest first, page by page."""
        asked: list[tuple[str, str]] = [("limit", "100")]
        asked += [("state", state)] if state else []
        asked += [("name", name)] if name else []
        asked += [("label", f"{key}={value}") for key, value in (labels or {}).items()]
        after: list[tuple[str, str]] = []
        while True:
            page = self.call("GET", "/v1/jobs", params=asked + after).json()
            yield from map(JobSummary.model_validate, page["data"])
            if not page["has_more"]:
                return
            after = [("after", page["last_id"])]

    def workers(self) -> list[Worker]:
        return [Worker.model_validate(row) for row in self.call("GET", "/v1/workers").json()["data"]]


def check(answer: httpx.Response) -> httpx.Response:
    if answer.is_success or answer.status_code == 304:
        return answer
    answer.read()
    try:
        problem = answer.json()
    except ValueError:
        problem = {"detail": answer.text[:300]}
    raise Refused(answer.status_code, problem if isinstance(problem, dict) else {"detail": str(problem)})
