#!/usr/bin/env python3
"""Holds the Python client against the OpenAPI document, and uses it against a running service.

    clients/python/tests/check_client.py --binary target/debug/secateur
"""

import argparse
import io
import json
import pathlib
import re
import sys
import tempfile
import threading

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parents[3]
sys.path[:0] = [str(HERE.parents[1] / "src"), str(ROOT / "scripts")]

import secateur  # noqa: E402
from secateur import types  # noqa: E402
from service import Service  # noqa: E402


def fields(document, name):
    """All properties of a schema, those of its parts among them."""
    found, open_, seen = {}, [{"$ref": f"#/components/schemas/{name}"}], set()
    while open_:
        schema = open_.pop()
        reference = schema.get("$ref")
        if reference:
            if reference not in seen:
                seen.add(reference)
                open_.append(document["components"]["schemas"][reference.rsplit("/", 1)[1]])
            continue
        found.update(schema.get("properties", {}))
        open_ += schema.get("allOf", []) + schema.get("oneOf", []) + schema.get("anyOf", [])
    return found


def check_document():
    document = json.loads((ROOT / "openapi/openapi.json").read_text())
    checked = 0
    names = {"Progress": "JobProgress", "Event": "EventRow"}
    classes = [c for c in vars(types).values() if isinstance(c, type) and issubclass(c, types.Told) and c is not types.Told]
    for shape in [*classes, secateur.Job]:
        known = fields(document, names.get(shape.__name__, shape.__name__))
        for field in shape.model_fields:
            assert field in known, f"{shape.__name__}.{field} is no field of the service: {sorted(known)}"
            checked += 1
    source = "".join(path.read_text() for path in (HERE.parents[1] / "src/secateur").glob("*.py"))
    paths = set(document["paths"])
    asked = [p.replace("{self.id}", "{id}").replace("{self.at}", "/v1/jobs/{id}").replace("{what}", "cancel") for p in re.findall(r'f?"((?:/v1|\{self\.at\})[^"]*)"', source)]
    for path in asked:
        assert path in paths, f"{path} is no route of the service"
    print(f"client: {checked} fields and {len(asked)} routes are those of the OpenAPI document")


def check_service(args):
    service = Service(args.binary, args.model, locked=True)
    try:
        try:
            list(secateur.Client(service.url).jobs())
            raise AssertionError("no key was needed")
        except secateur.Refused as refused:
            assert (refused.status, refused.code) == (401, "unauthorized")
        with secateur.Client(service.url, api_key=service.key) as client, tempfile.TemporaryDirectory() as home:
            try:
                client.submit(model={"from": "path", "path": "/nowhere"}, prune={"amount": {"layers": 0}})
                raise AssertionError("a bad spec was taken")
            except secateur.Refused as refused:
                assert {e["pointer"] for e in refused.errors} >= {"/prune/amount/layers"}, refused.errors
            job = client.submit(service.spec("from Python", 30), labels={"team": "nlp"})
            told = []
            listener = threading.Thread(target=lambda: told.extend(job.events()))
            listener.start()
            sys.stderr, kept = io.StringIO(), sys.stderr
            try:
                job.wait(timeout_s=180, progress=True)
            finally:
                line, sys.stderr = sys.stderr.getvalue(), kept
            assert "from Python" in line and job.state == "succeeded"
            listener.join(30)
            assert [e.seq for e in told] == list(range(1, job.last_seq + 1)), "events are missing"
            assert [len(s.points) for s in job.series("loss")] == [30]
            report = job.report()
            assert len(report.selection.dropped) == 1 and report.eval.healed
            page = job._repr_html_()
            assert "healed" in page and "<script" not in page
            files = job.download(home)
            assert len(files) == len(job.artifacts()) > 10
            whole = pathlib.Path(home, "healed/model.safetensors")
            data = whole.read_bytes()
            whole.unlink()
            whole.with_name("model.safetensors.part").write_bytes(data[:1000])
            assert job.download(home, only="healed/") and whole.read_bytes() == data
            assert [j.id for j in client.jobs(labels={"team": "nlp"})] == [job.id]
            assert client.workers()[0].device == "cpu"
            long = client.submit(service.spec("to be cancelled", 1_000_000))
            service.wait(str(long.id), until="running")
            long.cancel()
            try:
                long.wait(timeout_s=60, progress=False)
                raise AssertionError("it succeeded")
            except secateur.JobFailed as failed:
                assert failed.job.state == "cancelled"
            again = long.retry()
            assert again.retry_of == long.id
            again.cancel()
            service.wait(str(again.id))
            long.delete()
    finally:
        service.stop()
    print("client: submitted, followed, waited, reported, downloaded, resumed, cancelled, tried again, deleted")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    check_document()
    check_service(args)


if __name__ == "__main__":
    main()
