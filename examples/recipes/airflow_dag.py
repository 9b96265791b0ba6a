"""A DAG for Airflow that prunes a model by a service of secateur, and goes on only with a model that may ship.

The connection `secateur` (HTTP) names the service, its password is the API key. Nothing occupies a slot while the job runs.
"""

import json
import urllib.request
from datetime import timedelta

from airflow.sdk import BaseHook, Param, PokeReturnValue, dag, task

ENDED = ("succeeded", "failed", "cancelled")


def call(path, body=None, **headers):
    service = BaseHook.get_connection("secateur")
    if service.password:
        headers["Authorization"] = f"Bearer {service.password}"
    data = None if body is None else json.dumps(body).encode()
    url = f"{service.schema or 'http'}://{service.host}:{service.port or 8080}{path}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@dag(
    schedule=None, catchup=False, tags=["secateur"],
    params={"spec": Param({"model": {"from": "hub", "repo": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "prune": {"amount": {"layers": 6}}}, type="object")},
)
def prune_a_model():
    @task(retries=3)
    def submit(params=None, run_id=None):
        # Tried again, it is the same job.
        return call("/v1/jobs", params["spec"], **{"Idempotency-Key": run_id})["id"]

    @task.sensor(poke_interval=30, timeout=timedelta(days=2), mode="reschedule")
    def wait(job):
        told = call(f"/v1/jobs/{job}")
        if told["state"] in ("failed", "cancelled"):
            raise RuntimeError(f"job {job} is {told['state']}: {(told['failure'] or {}).get('message', '')}")
        return PokeReturnValue(is_done=told["state"] == "succeeded", xcom_value=job)

    @task.short_circuit
    def may_ship(job):
        verdict = call(f"/v1/jobs/{job}/report", Accept="application/json").get("verdict") or {}
        print(verdict.get("decision"), *verdict.get("reasons", []), sep="\n")
        return verdict.get("decision") != "reject"

    @task
    def publish(job):
        print(f"HF_ENDPOINT=<service>/hf reads the model {job}")

    job = wait(submit())
    may_ship(job) >> publish(job)


prune_a_model()
