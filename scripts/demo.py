#!/usr/bin/env python3
"""Prune, heal and measure a real language model through the HTTP API.

    scripts/demo.py --binary target/release/secateur [--spec examples/demo.json] [--out demo-result]

Starts `secateur up` on a free loopback port, posts the job, follows it live,
downloads the smaller model in parts, checks it, lets it write a few words and
prints what was gained and lost. Only Python's standard library is used, so
this file also shows how little a client of the API needs: see `Api`, `follow`
and `download`.
"""
import argparse
import base64
import contextlib
import ctypes
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PART_BYTES = 64 << 20
START_TIMEOUT_S = 120
MOST_RETRIES = 30
STOP_TIMEOUT_S = 30


class Failed(Exception):
    """Something a person should read; the demo ends."""


# --- A client of the API ---------------------------------------------------------------------


class Api:
    def __init__(self, port):
        self.port = port

    @contextlib.contextmanager
    def request(self, method, path, body=None, timeout_s=60, **headers):
        """One request on a connection of its own; yields the answer, not yet read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            body, headers["Content-Type"] = json.dumps(body), "application/json"
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise Failed(told_by(answer))
            yield answer
        finally:
            connection.close()

    def get(self, path, accept="application/json"):
        with self.request("GET", path, Accept=accept) as answer:
            return answer.read()

    def json(self, path):
        return json.loads(self.get(path))

    def post(self, path, body):
        with self.request("POST", path, body) as answer:
            return json.loads(answer.read())


def told_by(answer):
    """What a refusal says: RFC 9457, with every complaint and its place in the spec."""
    text = answer.read().decode(errors="replace")
    try:
        problem = json.loads(text)
    except ValueError:
        return f"HTTP {answer.status}: {text}"
    lines = [f"HTTP {answer.status}: {problem.get('detail') or problem.get('title')}"]
    lines += [f"  {error['pointer'] or '/'}: {error['message']}" for error in problem.get("errors") or []]
    return "\n".join(lines)


def events(api, path):
    """Yields (name, data) of every server-sent event. A broken line is taken up
    again after the last event that was heard."""
    last_id = "0"
    retries = 0
    while retries < MOST_RETRIES:
        try:
            with api.request("GET", path, Accept="text/event-stream", Last_Event_ID=last_id) as answer:
                name, data, event_id = "message", [], None
                for line in answer:
                    field, _, value = line.decode().rstrip("\r\n").partition(":")
                    value = value.removeprefix(" ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        data.append(value)
                    elif field == "id":
                        event_id = value
                    elif not field and not value and data:
                        yield name, json.loads("\n".join(data))
                        if name == "end":
                            return
                        last_id, retries = event_id or last_id, 0
                        name, data, event_id = "message", [], None
        except (OSError, http.client.HTTPException) as error:
            print(f"the event stream broke ({error}); taking it up after event {last_id}", file=sys.stderr)
        retries += 1
        time.sleep(1)
    raise Failed("the service does not answer any more; its log says why")


def download(api, artifact, target):
    """Fetches a file in parts, each with a connection of its own. What is there
    already, from a download that broke off, is kept; the sha256 decides."""
    size, sha256 = artifact["size_bytes"], artifact["sha256"]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    requests = 0
    with open(part, "ab") as file:
        if file.tell() > size:
            file.truncate(0)
        while (start := file.seek(0, os.SEEK_END)) < size:
            end = min(start + PART_BYTES, size) - 1
            etag = f'"{sha256}"'
            with api.request("GET", artifact["url"], Range=f"bytes={start}-{end}", If_Range=etag) as answer:
                if answer.status != 206 or answer.headers["ETag"] != etag:
                    raise Failed(f"{artifact['path']}: asked for bytes {start}-{end}, got HTTP {answer.status}")
                promised = answer.headers["Repr-Digest"]
                if promised != f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:":
                    raise Failed(f"{artifact['path']}: Repr-Digest {promised} is not the listed sha256")
                shutil.copyfileobj(answer, file)
            requests += 1
    if (found := sha256_of(part)) != sha256:
        part.unlink()
        raise Failed(f"{artifact['path']}: sha256 is {found}, the service said {sha256}")
    part.rename(target)
    return requests


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- The service, for as long as the demo runs -----------------------------------------------


@contextlib.contextmanager
def service(binary, roots, log_path):
    """`secateur up` with a database of its own in a directory that goes away again."""
    adopt_orphans()
    # Not /tmp, which may live in memory: checkpoints are large.
    home = Path(tempfile.mkdtemp(prefix="secateur-demo-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    home.chmod(0o755)  # as root, PostgreSQL runs as another user, who must get through
    port = free_port()
    command = [binary, "up", "--bind", f"127.0.0.1:{port}", "--data-dir", home / "data"]
    command += [argument for root in roots for argument in ("--allow-root", root)]
    # What is set for another secateur must not lead this one astray.
    strange = {"DATABASE_URL", *(name for name in os.environ if name.startswith("SECATEUR_"))}
    env = {name: value for name, value in os.environ.items()
           if name not in strange or name == "SECATEUR_PG_BIN"}
    with open(log_path, "wb") as log:
        # A session of its own: Ctrl-C comes to us, and we shut the service down in order.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env=env, start_new_session=True)
    try:
        api = Api(port)
        wait_until_ready(api, process, log_path)
        yield api
    finally:
        stop(process)
        shutil.rmtree(home, ignore_errors=True)


def wait_until_ready(api, process, log_path):
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"secateur up ended with code {process.returncode}:\n{tail(log_path)}")
        with contextlib.suppress(OSError, Failed, http.client.HTTPException):
            api.get("/readyz")
            return
        time.sleep(0.2)
    raise Failed(f"secateur up was not ready after {START_TIMEOUT_S} s:\n{tail(log_path)}")


def stop(process):
    """Asks the service to end; whatever is left of it afterwards is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    deadline = time.monotonic() + 10
    while left := children():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(0.2)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def adopt_orphans():
    """Processes whose parent dies become our children, so that none is left behind."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def children():
    pid = os.getpid()
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(path, lines=20):
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


# --- What a person sees ----------------------------------------------------------------------


class Display:
    """Progress on one line of a terminal; elsewhere a line now and then."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.said = None
        self.loss = None

    def say(self, text):
        print(f"\r\033[K{text}" if self.live else text, flush=True)

    def progress(self, data):
        bar = "█" * round(24 * data["fraction"])
        text = f"  {data['stage']:<8} {bar:░<24} {data['task']}: {data['done']}/{data['total']} {data['unit']}"
        if self.loss is not None and data["stage"] == "heal":
            text += f", loss {self.loss:.3f}"
        if data.get("eta_s") is not None:
            text += f", {data['eta_s']} s left"
        if self.live:
            width = shutil.get_terminal_size().columns
            print(f"\r\033[K{text[:width - 1]}", end="", flush=True)
            return
        tenth = (data["stage"], data["task"], int(10 * data["fraction"]))
        if tenth != self.said:
            self.said = tenth
            print(text, flush=True)

    def event(self, name, data):
        if name == "progress":
            self.progress(data)
        elif name == "measured" and data["name"] == "loss":
            self.loss = data["value"]
        elif name == "noted":
            self.say(f"  {data['stage'] or '':<8} {data['message']}")
        elif name == "state_changed":
            reason = f": {data['reason']}" if data.get("reason") else ""
            self.say(f"  job is {data['state']}{reason}")
        elif name == "stage_finished":
            how = "was there already" if data["reused"] else f"done in {data['duration_ms'] / 1000:.0f} s"
            self.say(f"  {data['stage']:<8} {how}")


def follow(api, job, display):
    """Shows what happens to the job until it ends; returns it as it is then."""
    for name, data in events(api, job["links"]["events"]):
        display.event(name, data)
    job = api.json(job["links"]["self"])
    if job["state"] != "succeeded":
        failure = job.get("failure") or {}
        where = f" in {failure['stage']}" if failure.get("stage") else ""
        raise Failed(f"the job {job['state']}{where}: {failure.get('message', 'no reason given')}")
    return job


def table(report):
    """Base, pruned and healed, side by side, as lines of Markdown."""
    scores = {name: report["eval"][name] for name in ("base", "pruned", "healed") if report["eval"].get(name)}
    columns = list(scores.values())
    rows = [
        ["layers", *(str(s["layer_count"]) for s in columns)],
        ["parameters", *(f"{s['parameters'] / 1e6:.1f} M" for s in columns)],
        ["weights", *(f"{s['size_bytes'] / 1e6:.1f} MB" for s in columns)],
    ]
    for i, first in enumerate(columns[0]["perplexity"]):
        rows.append([f"perplexity, {Path(first['corpus']).name}",
                     *(f"{s['perplexity'][i]['value']:.2f}" for s in columns)])
    for i, first in enumerate(columns[0]["tasks"]):
        found = [s["tasks"][i] for s in columns]
        rows.append([f"{first['task']} ({first['n']})",
                     *(f"{100 * t['acc']:.1f} ± {100 * t['stderr']:.1f} %" for t in found)])
    for kind in ("prefill", "decode"):
        if all(s["speed"] for s in columns):
            speeds = [s["speed"][f"{kind}_tokens_per_s"] for s in columns]
            rows.append([f"{kind}, tokens/s", *(f"{speed:.0f}" for speed in speeds)])
    rows.append(["peak memory", *(f"{s['peak_memory_bytes'] / 1e6:.0f} MB" for s in columns)])
    rows = [["", *scores], *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths))) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


# --- The demo --------------------------------------------------------------------------------


def fill_paths(spec, model):
    """The API takes absolute paths only; in the example they start at the project."""
    spec["model"]["path"] = str(model)
    corpora = [spec["calibration"]["corpus"], *(heal["corpus"] for heal in spec["heal"]),
               *spec["eval"]["perplexity"], *(task["items"] for task in spec["eval"]["tasks"])]
    for corpus in corpora:
        if corpus["from"] == "path":
            corpus["path"] = str(ROOT / corpus["path"])
    return spec


def fetch_checkpoint(api, job, report, out):
    """Downloads the healed model, or the pruned one when healing did not help."""
    name = "healed" if report["eval"].get("healed") else "pruned"
    files = [file for file in api.json(job["links"]["artifacts"])["data"]
             if file["path"].startswith(f"{name}/")]
    if not files:
        raise Failed(f"the job lists no files below {name}/")
    for file in files:
        requests = download(api, file, out / file["path"])
        parts = f" in {requests} parts" if requests > 1 else ""
        print(f"  {file['path']:<36} {file['size_bytes']:>12,} bytes{parts}, sha256 as listed")
    return out / name


def write_words(binary, model, prompt):
    command = [binary, "generate", "--model", model, "--prompt", prompt, "--tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the downloaded model does not work: {done.stderr.strip()}")
    return done.stdout.strip()


def demo(binary, spec_path, model, out):
    began = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    spec = fill_paths(json.loads(spec_path.read_text()), model)
    roots = [ROOT / "examples", model.parent]
    with service(binary, roots, out / "service.log") as api:
        print(f"The service answers at http://127.0.0.1:{api.port} (/docs shows its API).")
        job = api.post("/v1/jobs", spec)
        print(f"Job {job['id']} is {job['state']}:")
        job = follow(api, job, Display())
        report = json.loads(api.get(job["links"]["report"]))
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "report.html").write_bytes(api.get(job["links"]["report"], accept="text/html"))
        print("Downloading the result:")
        checkpoint = fetch_checkpoint(api, job, report, out)
    prompt = "Question: What do bees make?\nAnswer:"
    words = write_words(binary, checkpoint, prompt)
    dropped = ", ".join(map(str, report["selection"]["dropped"]))
    print(f"\nThe downloaded model writes:\n\n  {words.replace(chr(10), chr(10) + '  ')}\n")
    print(f"Layers dropped: {dropped}\n")
    print("\n".join(table(report)))
    verdict = report["verdict"]
    print(f"\nVerdict on the {verdict['checkpoint']} model: {verdict['decision']}")
    print("\n".join(f"  {reason}" for reason in verdict["reasons"]))
    for remark in report["remarks"]:
        print(f"\nNote: {remark}")
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. What is left:")
    for left, what in ((checkpoint, "a Hugging Face checkpoint, loads everywhere"),
                       (out / "report.html", "the report: profile, loss, this table"),
                       (out / "report.json", "the same for programs"),
                       (out / "service.log", "the service's log")):
        print(f"  {os.path.relpath(left):<26} {what}")


def main():
    cache = os.environ.get("SECATEUR_CACHE") or \
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", type=Path, required=True, help="the built secateur")
    parser.add_argument("--spec", type=Path, default=ROOT / "examples" / "demo.json")
    parser.add_argument("--model", type=Path, default=Path(cache) / "models" / "smollm2-135m-instruct",
                        help="as scripts/fetch_model.py leaves it (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-result")
    options = parser.parse_args()
    # As Ctrl-C: unwind, and shut the service down on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        demo(options.binary.resolve(), options.spec, options.model.resolve(), options.out.resolve())
    except Failed as failure:
        sys.exit(f"\ndemo: {failure}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: stopped")


if __name__ == "__main__":
    main()
