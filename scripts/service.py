"""A service for the checks: `secateur up` in a directory of its own, and calls to it. Standard library only."""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import tiny_model

KEY = "sct_abcd1234_0123456789abcdef01234567"
ENDED = ["succeeded", "failed", "cancelled"]


def until(what, holds, seconds=120):
    """Waits until `holds()`. Whoever is asked may still be on its way up: errors are no answer yet."""
    deadline, why = time.monotonic() + seconds, ""
    while True:
        try:
            if holds():
                return
        except Exception as error:
            why = f" ({error})"
        if time.monotonic() > deadline:
            raise SystemExit(f"after {seconds} s still not: {what}{why}")
        time.sleep(0.2)


class Service:
    def __init__(self, binary, model, *flags, locked=False):
        self.home = tempfile.TemporaryDirectory(prefix="secateur-check-")
        os.chmod(self.home.name, 0o755)
        self.text = os.path.join(self.home.name, "text.txt")
        with open(self.text, "w") as file:
            file.write("Once upon a time there was a little dog who liked to run in the park. " * 400)
        # Without a model of yours a tiny one with random weights does.
        self.model = str(pathlib.Path(model).resolve()) if model else tiny_model.write(pathlib.Path(self.home.name, "model"))
        self.key, self.port = KEY if locked else None, "0"
        self.command = [binary, "up", "--data-dir", self.home.name, "--allow-root", self.model, "--allow-root", self.home.name,
                        "--threads", "1", *flags]
        self.start()

    def start(self):
        env = {**os.environ, "RUST_LOG": os.environ.get("RUST_LOG", "error"), **({"SECATEUR_API_KEY": self.key} if self.key else {})}
        bind = ["--bind", f"127.0.0.1:{self.port}"]
        self.process = subprocess.Popen(self.command + bind, stdout=subprocess.PIPE, text=True, env=env)
        self.url = self.process.stdout.readline().split()[-1]
        # The same one after a restart.
        self.port = self.url.rsplit(":", 1)[1]

    def kill(self):
        """As when the machine loses power: no word to anybody."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.home.cleanup()

    def call(self, path, body=None, method=None):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as refused:
            raise RuntimeError(f"{path}: {refused.read().decode()}") from refused
        return json.loads(text) if text else None

    def spec(self, name, steps=5, **more):
        """A job of seconds on a tiny model; no steps: nothing is healed."""
        text = {"from": "path", "path": self.text}
        heal = {"method": "qlora", "corpus": text, "steps": steps, "batch_size": 2, "seq_len": 64, "checkpoint_every": 20}
        return {
            "name": name, "model": {"from": "path", "path": self.model}, "prune": {"amount": {"layers": 1}},
            "calibration": {"corpus": text, "samples": 8, "seq_len": 64}, "heal": [heal] if steps else [],
            "eval": {"speed": False}, **more,
        }

    def submit(self, name, steps=5, **more):
        return self.call("/v1/jobs", self.spec(name, steps, **more))["id"]

    def wait(self, job, seconds=180, until=None):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.call(f"/v1/jobs/{job}")["state"]
            if state == until or (until is None and state in ENDED):
                return state
            time.sleep(0.2)
        raise TimeoutError(f"the job {job} is {state}")
