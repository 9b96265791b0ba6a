#!/usr/bin/env python3
"""Publishes results on a small Hub of our own, which the real client (PyPI: huggingface_hub) has used before.

    scripts/check_hub.py --binary target/debug/secateur

The Hub speaks what huggingface.co speaks of making repositories, of Git LFS (whole and in parts) and of commits, and checks all of
it. First the real client uploads a directory and reads it back, so that we know it for a Hub; then jobs publish, while the Hub is away
and the service is killed. Each repository must hold its job's checkpoint byte for byte, in one commit, and the token nobody but it.
"""

import argparse
import base64
import hashlib
import json
import os
import pathlib
import subprocess
import tempfile
import urllib.parse

from receiver import Receiver
from service import Service, until

TOKEN = "hf_canaryCanaryCanary"
# What is larger goes by LFS, and what is larger still in parts of so many bytes.
LARGE, PART = 10_000, 40_000


class Hub(Receiver):
    def __init__(self):
        super().__init__(self.answer)
        self.repos, self.large, self.parts, self.verified = {}, {}, {}, set()

    def answer(self, method, path, headers, body):
        path = urllib.parse.unquote(path)
        if path.startswith("/storage/"):
            assert "authorization" not in headers, "the storage is told no token"
            return self.store(method, path.removeprefix("/storage/"), body)
        if method in ("POST", "PUT"):
            assert headers.get("authorization") == f"Bearer {TOKEN}", (method, path)
        told = self.route(method, path.split("?")[0], path, headers, body)
        status, value, more = told if isinstance(told, tuple) else (200, told, {})
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        return status, text, {"Content-Type": "application/json", **more}

    def store(self, method, at, body):
        oid, _, number = at.partition("/")
        if method == "POST":
            sent = json.loads(body)
            told = {part["partNumber"]: part["etag"].strip('"') for part in sent["parts"]}
            here = {number: body for (of, number), body in self.parts.items() if of == sent["oid"]}
            assert told == {number: hashlib.md5(body).hexdigest() for number, body in here.items()}
            self.large[sent["oid"]] = b"".join(here[number] for number in sorted(here))
            return 200, b'{"success": true}'
        if not number:
            self.large[oid] = body
            return 200, b""
        assert len(body) <= PART
        self.parts[oid, int(number)] = body
        return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def route(self, method, path, whole, headers, body):
        sent = json.loads(body) if body and "ndjson" not in headers.get("content-type", "") else None
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "my-team", "orgs": []}
        if path == "/api/repos/create":
            name = f"{sent.get('organization') or 'my-team'}/{sent['name']}"
            url = {"url": f"{self.url}/{name}", "id": name}
            if name in self.repos:
                return 409, {"error": "You already created this model repo", **url}, {}
            self.repos[name] = {"private": sent.get("private"), "files": {}, "commits": []}
            return url
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "multipart" if "multipart" in sent["transfers"] else "basic", "objects": [self.object(o, sent) for o in sent["objects"]]}
        if path == "/lfs/verify":
            assert hashlib.sha256(self.large[sent["oid"]]).hexdigest() == sent["oid"] and len(self.large[sent["oid"]]) == sent["size"]
            self.verified.add(sent["oid"])
            return {}
        if parts[:2] == ["api", "models"]:
            repo = self.repos["/".join(parts[2:4])]
            return self.model(repo, method, parts[4:], whole, headers, sent, body)
        if "resolve" in parts:
            repo, name = self.repos["/".join(parts[:2])], "/".join(parts[4:])
            content = repo["files"][name]
            more = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repo["commits"][0]["id"]}
            return 200, content, more
        return 404, {"error": f"nothing at {path}"}, {}

    def object(self, asked, batch):
        assert (batch["operation"], batch["hash_algo"]) == ("upload", "sha256")
        oid, size = asked["oid"], asked["size"]
        if oid in self.large:
            return {"oid": oid, "size": size}
        upload = {"href": f"{self.url}/storage/{oid}"}
        if size > PART:
            numbers = range(1, -(-size // PART) + 1)
            urls = {f"{n:05}": f"{self.url}/storage/{oid}/{n}" for n in numbers}
            upload = {"href": f"{self.url}/storage/complete", "header": {"chunk_size": str(PART), **urls}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{self.url}/lfs/verify"}}}

    def model(self, repo, method, what, whole, headers, sent, body):
        if what[:1] == ["preupload"]:
            mode = lambda f: "lfs" if f["size"] > LARGE else "regular"
            assert all(len(base64.b64decode(f["sample"])) <= 512 for f in sent["files"])
            return {"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": None} for f in sent["files"]]}
        if what[:1] == ["commits"]:
            return [{**commit, "authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""} for commit in repo["commits"]]
        if what[:1] == ["commit"]:
            assert headers["content-type"] == "application/x-ndjson", headers["content-type"]
            return self.commit("/".join(whole.split("/")[3:5]), repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        siblings = [{"rfilename": name, "size": len(content)} for name, content in repo["files"].items()]
        if what[:1] == ["tree"]:
            return [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for name, content in repo["files"].items()]
        sha = repo["commits"][0]["id"] if repo["commits"] else "0" * 40
        return {"id": "my-team/x", "_id": "1", "sha": sha, "private": repo["private"], "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def commit(self, name, repo, lines):
        title = None
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                assert (line["key"], value["algo"]) == ("lfsFile", "sha256") and value["oid"] in self.verified, line
                assert len(self.large[value["oid"]]) == value["size"]
                repo["files"][value["path"]] = self.large[value["oid"]]
        oid = hashlib.sha1(json.dumps(lines).encode()).hexdigest()
        repo["commits"].insert(0, {"id": oid, "title": title})
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}", "hookOutput": ""}


def by_the_real_client(hub):
    """A directory with small and large files goes there and comes back by huggingface_hub."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=TOKEN)
    with tempfile.TemporaryDirectory() as home:
        here = pathlib.Path(home, "model")
        here.mkdir()
        files = {"config.json": b"{}", "README.md": b"---\ntags: [pruned]\n---\n", "one.safetensors": os.urandom(LARGE + 1), "many.safetensors": os.urandom(3 * PART + 7)}
        for name, content in files.items():
            (here / name).write_bytes(content)
        api.create_repo("my-team/theirs", private=True, exist_ok=True)
        api.upload_folder(repo_id="my-team/theirs", folder_path=here)
        assert hub.repos["my-team/theirs"]["files"] == files
        back = pathlib.Path(api.snapshot_download("my-team/theirs", cache_dir=pathlib.Path(home, "cache")))
        assert {path.name: path.read_bytes() for path in back.iterdir()} == files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    hub = Hub()
    hub.start()
    by_the_real_client(hub)
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    service = Service(args.binary, args.model, "--publish-to", "my-team", "--sink-patience", "0.05")
    publish = lambda name: {"publish": {"repo": f"my-team/{name}"}}
    try:
        jobs = {"first": service.submit("first", 3, **publish("first"))}
        assert service.wait(jobs["first"]) == "succeeded"
        until("the first repository", lambda: hub.repos["my-team/first"]["commits"])
        hub.stop()
        for name in ["second", "third"]:
            jobs[name] = service.submit(name, 3, **publish(name))
            assert service.wait(jobs[name]) == "succeeded"
        hub.start()
        until("the next repository", lambda: len(hub.repos) >= 3)
        service.kill()
        service.start()
        # What the killed service was trying is tried again when its claim is over: three minutes with this patience.
        until("all repositories", lambda: all(hub.repos[f"my-team/{name}"]["commits"] for name in jobs), 300)
        large = 0
        for name, job in jobs.items():
            repo = hub.repos[f"my-team/{name}"]
            artifacts = {a["path"]: a for a in service.call(f"/v1/jobs/{job}/artifacts")["data"]}
            best = "healed/" if "healed/config.json" in artifacts else "pruned/"
            wanted = {path.removeprefix(best): a["sha256"] for path, a in artifacts.items() if path.startswith(best)}
            assert {path: hashlib.sha256(content).hexdigest() for path, content in repo["files"].items()} == wanted
            assert [c["title"] for c in repo["commits"]] == [f"The result of job {job}"] and repo["private"] is True
            assert "README.md" in wanted and b"base_model" in repo["files"]["README.md"] or b"pruned" in repo["files"]["README.md"]
            large += sum(len(content) > PART for content in repo["files"].values())
            shown = json.dumps([service.call(f"/v1/jobs/{job}"), service.call(f"/v1/jobs/{job}/events?limit=1000")])
            assert TOKEN not in shown
        assert large, "nothing went in parts"
        held = subprocess.run(["grep", "-rlF", TOKEN, service.home.name], capture_output=True, text=True).stdout
        assert not held, f"the token is in {held}"
    finally:
        hub.stop()
        service.stop()
    print(f"Hub: {len(jobs)} results published, one commit each, byte for byte, {large} files in parts; the Hub was away and the service killed in "
          f"between; huggingface_hub itself takes this Hub for one; the token is in no file, answer or event")


if __name__ == "__main__":
    main()
