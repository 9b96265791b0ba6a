#!/usr/bin/env python3
"""Keeps everything in S3 (PyPI: moto, a server that speaks as S3 does) and looks at it with boto3.

    scripts/check_s3.py --binary target/debug/secateur [--moto VENV/bin/moto_server]

API and worker are two processes with nothing in common but database and bucket: a job that reads an upload, one that goes on with
its result, ranges, redirects to the bucket, the bundle, a large file in parts, a manifest that nobody can write twice, files of an
attempt that did not count, and a deletion.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request

import tiny_model
from service import Service, until

BUCKET, PREFIX, PORT = "finished", "team/secateur", 5918


class Moto:
    def __init__(self, program, host="127.0.0.1"):
        self.url = f"http://127.0.0.1:{PORT}"
        self.process = subprocess.Popen([program, "-H", host, "-p", str(PORT)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.environ |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
                       "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": self.url}
        import boto3
        self.s3 = boto3.client("s3")
        until("moto", lambda: self.s3.create_bucket(Bucket=BUCKET), 30)

    def keys(self, below=""):
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{PREFIX}/{below}")
        return {item["Key"].removeprefix(f"{PREFIX}/"): item for page in pages for item in page.get("Contents", [])}

    def stop(self):
        self.process.terminate()
        self.process.wait()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def ask(url, **headers):
    """Status, headers and body, redirects not followed."""
    try:
        with urllib.request.build_opener(NoRedirect).open(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as other:
        return other.code, other.headers, other.read()


def bring(service, text):
    """An upload of two parts."""
    digest = hashlib.sha256(text).hexdigest()
    upload = service.call("/v1/uploads", {"name": "corpus.txt", "size_bytes": len(text), "sha256": digest})
    size = upload["part_size_bytes"]
    for number in range(1, upload["part_count"] + 1):
        part = text[(number - 1) * size:number * size]
        request = urllib.request.Request(f"{service.url}/v1/uploads/{upload['id']}/parts/{number}", data=part, method="PUT")
        urllib.request.urlopen(request, timeout=60).close()
    assert service.call(f"/v1/uploads/{upload['id']}/complete", method="POST")["complete"]
    return upload["id"], upload["part_count"]


def files(service, moto, job):
    """Every file of a job: by the API whole and in a range, by a link, and in the bucket."""
    linked = 0
    for artifact in service.call(f"/v1/jobs/{job}/artifacts")["data"]:
        url = service.url + artifact["url"]
        status, headers, body = ask(url + "?proxy=1")
        assert status == 200 and hashlib.sha256(body).hexdigest() == artifact["sha256"], artifact
        status, headers, part = ask(url + "?proxy=1", Range="bytes=1-")
        assert (status, part) == (206, body[1:]) if len(body) > 1 else True, artifact
        status, headers, _ = ask(url)
        assert status == 307, (status, artifact)
        assert ask(headers["Location"])[2] == body
        assert ask(headers["Location"], Range="bytes=0-0")[::2] == (206, body[:1])
        status, _, here = ask(url, **{"If-Range": f'"{artifact["sha256"]}"', "Range": "bytes=0-0"})
        assert (status, here) == (206, body[:1])
        linked += 1
    return linked


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    parser.add_argument("--moto", default=str(pathlib.Path(sys.executable).with_name("moto_server")))
    args = parser.parse_args()
    moto = Moto(args.moto)
    url = f"s3://{BUCKET}/{PREFIX}"
    # Weights of more than one part.
    tiny_model.HIDDEN, tiny_model.INNER = 256, 1024
    service = Service(args.binary, args.model, "--store-url", url)
    try:
        other = pathlib.Path(service.home.name, "other")
        refused = subprocess.run([args.binary, "up", "--data-dir", other, "--bind", "127.0.0.1:0", "--store-url", "s3://nowhere-at-all"], capture_output=True, text=True)
        assert refused.returncode == 1 and "s3://nowhere-at-all" in refused.stderr, refused
        for named, word in [(url, "good"), ("s3://nowhere-at-all", "bad")]:
            asked = [args.binary, "doctor", "--offline", "--json", "--data-dir", other, "--store-url", named]
            findings = json.loads(subprocess.run(asked, capture_output=True, text=True).stdout)
            assert [f["health"] for f in findings if f["about"] == "store"] == [word], findings
        text = b"Once upon a time there was a little dog who liked to run in the park. "
        large, parts = bring(service, text * 260_000)
        assert parts == 2 and len(moto.keys(f"uploads/{large}")) == parts
        service.call(f"/v1/uploads/{large}", method="DELETE")
        upload, _ = bring(service, text * 100)
        brought = {"from": "upload", "upload_id": upload}
        quick = {"calibration": {"corpus": brought, "samples": 8, "seq_len": 64}, "eval": {"perplexity": [{"from": "path", "path": service.text}], "speed": False, "seq_len": 64, "generation": None}}
        first = service.submit("reads an upload", 0, **quick)
        assert service.wait(first) == "succeeded", service.call(f"/v1/jobs/{first}")
        second = service.submit("goes on with its result", 0, model={"from": "job", "job_id": first}, **quick)
        assert service.wait(second) == "succeeded", service.call(f"/v1/jobs/{second}")
        linked = sum(files(service, moto, job) for job in (first, second))

        # The manifest names every file, and nobody can write it twice.
        artifacts = {a["path"]: a["sha256"] for a in service.call(f"/v1/jobs/{first}/artifacts")["data"]}
        at = f"jobs/{first}/e1/MANIFEST.json"
        told = json.loads(moto.s3.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{at}")["Body"].read())
        assert {f["path"]: f["sha256"] for f in told["files"]} == artifacts
        try:
            moto.s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{at}", Body=b"{}", IfNoneMatch="*")
            raise SystemExit("the manifest was written twice")
        except moto.s3.exceptions.ClientError as error:
            assert error.response["Error"]["Code"] == "PreconditionFailed", error

        # The bundle, and the client that resumes.
        status, _, bundle = ask(f"{service.url}/v1/jobs/{first}/bundle.tar")
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, "bundle.tar")
            path.write_bytes(bundle)
            with tarfile.open(path) as tar:
                here = {m.name.split("/", 1)[1]: hashlib.sha256(tar.extractfile(m).read()).hexdigest() for m in tar}
            assert {k: v for k, v in here.items() if k != "SHA256SUMS"} == {k: v for k, v in artifacts.items() if k != "SHA256SUMS"}
            fetched = subprocess.run([args.binary, "jobs", "--server", service.url, "download", first, "pruned", "--out", directory], capture_output=True, text=True)
            assert fetched.returncode == 0, fetched.stderr
            assert pathlib.Path(directory, "pruned/config.json").exists()

        # Nothing of an attempt that did not count stays, and nothing of what is deleted.
        orphan = f"{PREFIX}/jobs/{first}/e99/pruned/config.json"
        moto.s3.put_object(Bucket=BUCKET, Key=orphan, Body=b"{}")
        service.process.terminate()
        service.process.wait(60)
        service.start()
        until("the orphan gone", lambda: f"jobs/{first}/e99/pruned/config.json" not in moto.keys("jobs"), 60)
        assert len(moto.keys(f"jobs/{first}/e1/")) == len(artifacts) + 1
        service.call(f"/v1/jobs/{second}", method="DELETE")
        until("the deleted gone", lambda: not moto.keys(f"jobs/{second}/"))
        service.call(f"/v1/uploads/{upload}", method="DELETE")
        until("the upload gone", lambda: not moto.keys("uploads"))
        copies = list(pathlib.Path(service.home.name).glob("copies/*"))
        assert not copies, copies
        held = sum(item["Size"] for item in moto.keys().values())
        assert any(k.endswith(".safetensors") and "-" in item["ETag"] for k, item in moto.keys().items()), "no weights in parts"
        multipart = [k for k, item in moto.keys().items() if "-" in item["ETag"]]
    finally:
        service.stop()
        moto.stop()
    print(f"S3: an upload of {parts} parts and two jobs, {linked} files whole, in ranges and by links, {held / 1e6:.1f} MB kept"
          f" ({len(multipart)} objects in parts); a manifest written once, an orphan swept, deletions done")


if __name__ == "__main__":
    main()
