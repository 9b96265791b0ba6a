#!/usr/bin/env python3
"""Proves the MLflow sink against a real MLflow server (PyPI: mlflow), which is killed and started again in between.

    scripts/check_mlflow.py --binary target/debug/secateur --mlflow VENV/bin/mlflow

Jobs succeed, are cancelled, and end while the server is away; the service is killed, too. In the end there is one run
per job, with parameters, every measured value once, tags, and the report and plots byte for byte.
"""

import argparse
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

from service import Service, until

PORT = 5917


class Server:
    def __init__(self, program):
        self.program, self.home = program, tempfile.TemporaryDirectory(prefix="secateur-mlflow-")
        self.url = f"http://127.0.0.1:{PORT}"

    def start(self):
        self.process = subprocess.Popen(
            [self.program, "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{self.home.name}/runs.db", "--serve-artifacts",
             "--artifacts-destination", f"{self.home.name}/files"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=self.home.name,
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("the MLflow server does not start")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def runs(client):
    experiment = client.get_experiment_by_name("secateur")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def check(client, service, job, status):
    """The run of a job has all that the job has, and nothing twice."""
    found = [r for r in runs(client) if r.data.tags.get("secateur.job_id") == job]
    assert len(found) == 1, f"{len(found)} runs of {job}"
    run = found[0]
    assert run.info.status == status, (run.info.status, status)
    shown = service.call(f"/v1/jobs/{job}")
    assert run.info.run_name == shown["name"]
    assert run.data.params["prune.amount.layers"] == "1" and run.data.params["model.path"] == service.model
    assert run.data.tags["secateur.label.team"] == "nlp" and run.data.tags["secateur.state"] == shown["state"]
    points = 0
    for series in service.call(f"/v1/jobs/{job}/metrics")["data"]:
        told = [(p["step"], p["value"]) for p in series["points"]]
        kept = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, f"{series['stage']}/{series['key']}")]
        assert sorted(told) == sorted(kept), f"{series['key']}: {len(told)} told, {len(kept)} kept"
        points += len(kept)
    files = 0
    if shown["state"] == "succeeded":
        assert "pruned/perplexity/model" in run.data.metrics or any(k.startswith("pruned/") for k in run.data.metrics)
        wanted = [a for a in service.call(f"/v1/jobs/{job}/artifacts")["data"]
                  if "/" not in a["path"] or a["path"].startswith("plots/")]
        for artifact in wanted:
            with urllib.request.urlopen(service.url + artifact["url"]) as answer:
                here = answer.read()
            with tempfile.TemporaryDirectory() as directory:
                there = pathlib.Path(client.download_artifacts(run.info.run_id, artifact["path"], directory)).read_bytes()
            assert here == there, artifact["path"]
            files += 1
    return points, files


def versions(client, service, succeeded):
    """Each job that succeeded is one version of the model, whose files are the checkpoint's."""
    import mlflow

    mlflow.set_tracking_uri(client.tracking_uri)
    found = {v.run_id: v for v in client.search_model_versions("name='shears'")}
    assert len(client.search_model_versions("name='shears'")) == len(found) == len(succeeded)
    for job, run in succeeded.items():
        version = found[run.info.run_id]
        assert version.status == "READY" and version.tags["secateur.job_id"] == job, version
        with tempfile.TemporaryDirectory() as directory:
            here = pathlib.Path(mlflow.artifacts.download_artifacts(f"models:/shears/{version.version}", dst_path=directory))
            files = {str(p.relative_to(here)): hashlib.sha256(p.read_bytes()).hexdigest() for p in here.rglob("*") if p.is_file()}
        artifacts = {a["path"]: a["sha256"] for a in service.call(f"/v1/jobs/{job}/artifacts")["data"]}
        best = "healed/" if "healed/config.json" in artifacts else "pruned/"
        wanted = {path.removeprefix(best): sha for path, sha in artifacts.items() if path.startswith(best)}
        assert {name: sha for name, sha in files.items() if name != "registered_model_meta"} == wanted, (files, wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    parser.add_argument("--mlflow", default=str(pathlib.Path(sys.executable).with_name("mlflow")))
    args = parser.parse_args()
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    from mlflow import MlflowClient

    server = Server(args.mlflow)
    server.start()
    service = Service(args.binary, args.model, "--mlflow-url", server.url, "--mlflow-model", "shears", "--sink-patience", "0.05")
    client = MlflowClient(server.url)
    labels = {"team": "nlp"}
    try:
        first = service.submit("while all is well", 30, labels=labels)
        assert service.wait(first) == "succeeded"
        until("the first run", lambda: runs(client) and runs(client)[0].info.status == "FINISHED")

        long = service.submit("cancelled in between", 1_000_000, labels=labels)
        service.wait(long, until="running")
        until("a run that is running", lambda: any(r.info.status == "RUNNING" for r in runs(client)))
        server.kill()
        service.call(f"/v1/jobs/{long}/cancel", method="POST")
        assert service.wait(long) == "cancelled"
        begun = time.monotonic()
        away = [service.submit(f"while the server is away {i}", 30, labels=labels) for i in range(2)]
        assert [service.wait(job) for job in away] == ["succeeded", "succeeded"]
        took = time.monotonic() - begun
        server.start()
        # And the service dies while it brings things over.
        time.sleep(0.3)
        service.kill()
        service.start()
        last = service.submit("after the kill", 30, labels=labels)
        assert service.wait(last) == "succeeded"

        # A sweep: its jobs' runs hang from one run.
        base = service.spec("base", 3, labels=labels)
        del base["name"]
        swept = service.call("/v1/sweeps", {"name": "how deep", "base": base, "axes": {"layers": {"from": 1, "to": 2, "step": 1}}})
        children = [job["job_id"] for job in swept["jobs"]]
        assert [service.wait(job) for job in children] == ["succeeded"] * 2

        jobs = [(first, "FINISHED"), (long, "KILLED"), *((job, "FINISHED") for job in away), (last, "FINISHED")]
        # What the killed service was trying is tried again when its claim is over, ten minutes at most.
        until("all runs have ended", lambda: len([r for r in runs(client) if r.info.end_time]) == len(jobs) + len(children) + 1, 900)
        counts = [check(client, service, job, status) for job, status in jobs]
        all_runs = {r.data.tags.get("secateur.job_id"): r for r in runs(client)}
        assert len(runs(client)) == len(all_runs) == len(jobs) + len(children) + 1, "a run too many"
        parent = all_runs.pop(None)
        assert (parent.info.run_name, parent.info.status, parent.data.tags["secateur.jobs.succeeded"]) == ("how deep", "FINISHED", "2")
        below = {job for job, r in all_runs.items() if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
        assert below == set(children), below
        succeeded = {job: r for job, r in all_runs.items() if r.info.status == "FINISHED"}
        versions(client, service, succeeded)
    finally:
        server.kill()
        service.stop()
    points, files = (sum(column) for column in zip(*counts))
    print(f"MLflow: {len(jobs)} jobs, {len(jobs)} runs, a sweep of {len(children)} below one run, {len(succeeded)} versions of a model byte for byte, {points} measured values each once, {files} files byte for byte; server and "
          f"service were killed in between; two jobs beside a dead server took {took:.1f} s")


if __name__ == "__main__":
    main()
