#!/usr/bin/env python3
"""Tries docs/RECIPES.md as far as it goes without the services it speaks of.

    scripts/check_recipes.py --binary target/debug/secateur

The sidecar follows a real job into a run of wandb on this machine (offline). The Kubeflow component is compiled by kfp, and its function called
against the service. Airflow parses its DAG, and its tasks' functions are called. The steps of the GitHub workflow are run by bash.
What is not installed is left out, and said.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types

from service import Service

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = ROOT / "examples/recipes"


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_records(data):
    """Records of a log as LevelDB has it, which is what wandb keeps a run in: blocks of 32 KiB, pieces of records with a head of seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb(service, home):
    job = service.submit("followed", 20, labels={"team": "nlp"})
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": home, "WANDB_SILENT": "true", "SECATEUR_URL": service.url, "PYTHONPATH": str(ROOT / "clients/python/src")}
    subprocess.run([sys.executable, RECIPES / "wandb_sidecar.py", job], check=True, env=env)
    from wandb.proto import wandb_internal_pb2

    [file] = pathlib.Path(home).glob(f"wandb/offline-run-*/run-{job}.wandb")
    losses, summary = {}, set()
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "heal/loss" in items:
            losses[int(json.loads(items["heal/step"]))] = json.loads(items["heal/loss"])
        summary |= {item.key or "/".join(item.nested_key) for item in record.summary.update}
    [told] = [s for s in service.call(f"/v1/jobs/{job}/metrics?key=loss")["data"] if s["stage"] == "heal"]
    assert losses == {p["step"]: p["value"] for p in told["points"]} and len(losses) == 20, (losses, told)
    assert "base/parameters" in summary, summary
    return f"a run of {len(losses)} losses and {len(summary)} values of the summary, read back from the file that wandb wrote"


def kfp(service, home):
    recipe, out = load("kubeflow_component"), pathlib.Path(home, "component.yaml")
    recipe.compiler.Compiler().compile(recipe.pipeline, str(out))
    from kfp.components import load_component_from_file

    component = load_component_from_file(str(out))
    assert set(component.component_spec.inputs) == {"service", "spec"}
    metrics = types.SimpleNamespace(all={}, log_metric=lambda name, value: metrics.all.update({name: value}))
    model = types.SimpleNamespace(uri="", metadata={})
    told = recipe.prune.python_func(service.url, service.spec("from a pipeline", 3), "run-1", metrics, model)
    again = recipe.prune.python_func(service.url, service.spec("from a pipeline", 3), "run-1", metrics, model)
    assert told == again, "tried twice, it is one job"
    assert service.call(f"/v1/jobs/{told.job_id}")["state"] == "succeeded" and model.uri.endswith(told.job_id)
    return f"compiled to {out.stat().st_size} bytes and read again; the function ran twice for one job, verdict `{told.verdict}`"


def airflow(service, home):
    os.environ |= {"AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW_CONN_SECATEUR": json.dumps(
        {"conn_type": "http", "host": "127.0.0.1", "port": int(service.port), "schema": "http"})}
    import airflow as package

    dag = load("airflow_dag").prune_a_model()
    tasks = {task.task_id: task for task in dag.tasks}
    assert {name: task.downstream_task_ids for name, task in tasks.items()} == {
        "submit": {"wait"}, "wait": {"may_ship", "publish"}, "may_ship": {"publish"}, "publish": set()}
    job = tasks["submit"].python_callable(params={"spec": service.spec("from a DAG", 3)}, run_id="run-2")
    assert job == tasks["submit"].python_callable(params={"spec": service.spec("from a DAG", 3)}, run_id="run-2")
    assert service.wait(job) == "succeeded"
    poked = tasks["wait"].python_callable(job)
    assert poked.is_done and poked.xcom_value == job
    ship = tasks["may_ship"].python_callable(job)
    return f"Airflow {package.__version__} built the DAG of {len(tasks)} tasks; submit (twice, one job), sensor and gate were called, gate: {ship}"


def github(service, home):
    import yaml

    workflow = yaml.safe_load((RECIPES / "github_action.yml").read_text())
    spec = pathlib.Path(home, "prune.json")
    spec.write_text(json.dumps(service.spec("from a workflow", 3)))
    output, summary = pathlib.Path(home, "output"), pathlib.Path(home, "summary")
    output.touch()
    env = {**os.environ, "SECATEUR_URL": service.url, "SECATEUR_API_KEY": "none", "SPEC": str(spec), "GITHUB_RUN_ID": "4711",
           "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
    steps = [step for step in workflow["jobs"]["prune"]["steps"] if "run" in step]
    codes = []
    for step in steps:
        told = dict(line.split("=", 1) for line in output.read_text().splitlines())
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=home, env={**env, "JOB": told.get("id", "")}, capture_output=True, text=True)
        codes.append(done.returncode)
        assert done.returncode == 0 or step is steps[-1], done.stderr
    verdict = json.loads(pathlib.Path(home, "report.json").read_text()).get("verdict") or {}
    assert codes[-1] == (1 if verdict.get("decision") == "reject" else 0), (codes, verdict)
    return f"{len(steps)} steps run by bash, the last one judged `{verdict.get('decision')}` and exited with {codes[-1]}; not run by GitHub"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    service, left = Service(args.binary, args.model), []
    try:
        for name, needs, try_it in [("Weights & Biases", "wandb", wandb), ("Kubeflow", "kfp", kfp), ("Airflow", "airflow", airflow), ("GitHub", "yaml", github)]:
            if importlib.util.find_spec(needs) is None:
                left.append(name)
                continue
            with tempfile.TemporaryDirectory() as home:
                print(f"{name}: {try_it(service, home)}")
    finally:
        service.stop()
    if left:
        print(f"left out, for it is not installed: {', '.join(left)}")


if __name__ == "__main__":
    main()
