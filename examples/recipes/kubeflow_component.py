#!/usr/bin/env python3
"""A component for Kubeflow Pipelines that prunes a model by a service of secateur: python kubeflow_component.py component.yaml

Needs the package kfp. The component itself needs Python's standard library only. In the cluster it reads the API key, where there is one, from
the environment (SECATEUR_API_KEY; mount it with kfp-kubernetes).
"""

import sys
from typing import NamedTuple

from kfp import compiler, dsl


@dsl.component(base_image="python:3.12-slim")
def prune(
    service: str, spec: dict, run: str, scores: dsl.Output[dsl.Metrics], model: dsl.Output[dsl.Model]
) -> NamedTuple("Outputs", [("job_id", str), ("verdict", str)]):
    """Asks for a pruned model, waits, and names it. `run` makes the request one job, however often the step is tried."""
    import json
    import os
    import urllib.request
    from collections import namedtuple

    def call(path, body=None, **headers):
        if "SECATEUR_API_KEY" in os.environ:
            headers["Authorization"] = f"Bearer {os.environ['SECATEUR_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(service + path, data, {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.load(answer)

    job = call("/v1/jobs", spec, **{"Idempotency-Key": run})
    while job["state"] not in ("succeeded", "failed", "cancelled"):
        job = call(f"/v1/jobs/{job['id']}", Prefer="wait=50")
    if job["state"] != "succeeded":
        raise RuntimeError(f"job {job['id']} is {job['state']}: {(job['failure'] or {}).get('message', '')}")
    report = call(f"/v1/jobs/{job['id']}/report", Accept="application/json")
    for checkpoint in ("base", "pruned", "healed"):
        for text in (report["eval"].get(checkpoint) or {}).get("perplexity", []):
            scores.log_metric(f"{checkpoint} perplexity {text['corpus']}", text["value"])
    # Any client of the Hub reads it: HF_ENDPOINT=<service>/hf and the job's id as the model's name.
    model.uri = f"{service}/hf/{job['id']}"
    model.metadata.update(hf_endpoint=f"{service}/hf", repo_id=job["id"])
    decision = (report.get("verdict") or {}).get("decision", "")
    return namedtuple("Outputs", ["job_id", "verdict"])(job["id"], decision)


@dsl.pipeline(name="prune-a-model")
def pipeline(service: str, spec: dict):
    prune(service=service, spec=spec, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)


if __name__ == "__main__":
    compiler.Compiler().compile(pipeline, sys.argv[1] if len(sys.argv) > 1 else "component.yaml")
