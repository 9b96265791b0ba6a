#!/usr/bin/env python3
"""Runs deploy/slurm for real: one node, two devices that are none, three jobs, one of them requeued while it heals.

    python3 scripts/slurm_trial.py --binary target/release/secateur --model models/smollm2-135m-instruct

Needs root, and Debian's slurmctld, slurmd, slurm-client, munge and postgresql. Everything is kept in a new directory
and stopped at the end; the configuration in /etc/slurm is taken over and put back. All three jobs must end well, the
requeued one without having spent an attempt and without measuring its profile anew. Exits with 1 otherwise.
"""
import argparse
import glob
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOST = socket.gethostname()
SLURM_CONF = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={dir}/slurmctld
SlurmdSpoolDir={dir}/slurmd
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
# Two devices by name only.
GRES_CONF = "NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n"


def run(*command, **more):
    return subprocess.run([str(c) for c in command], check=True, text=True, capture_output=True, **more).stdout


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Trial:
    def __init__(self, args):
        self.args, self.children = args, []
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="secateur-slurm-"))
        self.dir.chmod(0o755)
        self.binary = args.binary.resolve()

    def start(self, name, *command, **more):
        log = open(self.dir / f"{name}.log", "w")
        child = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log, **more)
        self.children.append(child)
        return child

    def postgres(self):
        programs = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1]
        data, port = self.dir / "pg", free_port()
        data.mkdir()
        shutil.chown(data, "postgres", "postgres")
        run("runuser", "-u", "postgres", "--", f"{programs}/initdb", "-D", data, "-A", "trust", "-U", "secateur")
        self.start("postgres", "runuser", "-u", "postgres", "--", f"{programs}/postgres", "-D", data, "-p", port,
                   "-c", f"unix_socket_directories={data}", "-c", "listen_addresses=127.0.0.1")
        self.database = f"postgres://secateur@127.0.0.1:{port}/postgres"

    def api(self):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.start("api", self.binary, "api", "--bind", f"127.0.0.1:{port}", "--allow-root", self.args.model.resolve(),
                   "--allow-root", ROOT / "examples", env=self.environment())
        self.until("the API", lambda: self.get("/readyz") is not None)

    def environment(self):
        return {**os.environ, "DATABASE_URL": self.database, "SECATEUR_DATA_DIR": str(self.dir / "data"),
                "SECATEUR": str(self.binary), "SECATEUR_DEVICE": "cpu"}

    def slurm(self):
        self.saved = {}
        for name, text in {"slurm.conf": SLURM_CONF, "gres.conf": GRES_CONF}.items():
            at = pathlib.Path("/etc/slurm") / name
            at.parent.mkdir(exist_ok=True)
            self.saved[at] = at.read_bytes() if at.exists() else None
            at.write_text(text.format(host=HOST, dir=self.dir, cpus=os.cpu_count()))
        (self.dir / "slurmctld").mkdir()
        (self.dir / "slurmd").mkdir()
        pathlib.Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        self.start("munge", "runuser", "-u", "munge", "--", "munged", "--foreground")
        time.sleep(1)
        self.start("slurmctld.out", "slurmctld", "-D")
        self.start("slurmd.out", "slurmd", "-D")
        self.until("Slurm", lambda: "idle" in run("sinfo", "-h", "-o", "%T"))

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return json.loads(answer.read() or b"null") if path.startswith("/v1") else answer.read()
        except OSError:
            return None

    def until(self, what, done, seconds=900):
        end = time.time() + seconds
        while time.time() < end:
            try:
                if done():
                    return
            except subprocess.CalledProcessError:
                pass
            time.sleep(0.5)
        raise SystemExit(f"{what}: not within {seconds} s; see {self.dir}")

    def submit(self, seed):
        text = {"from": "path", "path": str(ROOT / "examples/eval_text.txt")}
        spec = {
            "name": f"trial {seed}", "seed": seed, "model": {"from": "path", "path": str(self.args.model.resolve())},
            "calibration": {"corpus": text, "samples": 4, "seq_len": 64}, "prune": {"amount": {"layers": 10}},
            "heal": [{"method": "qlora", "corpus": text, "rank": 4, "steps": self.args.steps, "batch_size": 1,
                      "seq_len": 64, "checkpoint_every": 2}],
            "eval": {"perplexity": [{"from": "text", "text": "The sun rose over the quiet village. " * 40}],
                     "speed": False, "seq_len": 64, "generation": None},
        }
        request = urllib.request.Request(self.url + "/v1/jobs", json.dumps(spec).encode(),
                                         {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request).read())["id"]

    def logs(self):
        return {path: path.read_text() for path in self.dir.glob("secateur-*_*.log")}

    def events(self, job):
        return [e for e in self.get(f"/v1/jobs/{job}/events?limit=1000")["data"]]

    def go(self):
        self.postgres()
        time.sleep(2)
        self.api()
        self.slurm()
        jobs = [self.submit(seed) for seed in range(3)]
        out = run("sbatch", "--parsable", "--array=0-2", "--gres=gpu:1", "--chdir", self.dir,
                  ROOT / "deploy/slurm/secateur.sbatch", env=self.environment())
        array = out.strip()
        print("three jobs queued, array", array)
        self.until("two tasks", lambda: run("squeue", "-h", "-t", "R", "-j", array).count("\n") == 2)
        print(run("squeue", "-j", array, "-o", "%i %T %b").strip())
        healing = lambda: next((path for path, text in self.logs().items() if self.heals(text, jobs)), None)
        self.until("healing", healing)
        path = healing()
        task = re.search(r"_(\d+)\.log", path.name)[1]
        chosen = next(job for job in jobs if job in path.read_text())
        print(f"requeueing task {task}, which heals job {chosen}")
        run("scontrol", "requeue", f"{array}_{task}")
        ended = lambda: all(self.get(f"/v1/jobs/{job}")["state"] in ("succeeded", "failed") for job in jobs)
        self.until("the jobs", ended, 1800)
        good = True
        for job in jobs:
            found = self.get(f"/v1/jobs/{job}")
            print(f"job {job}: {found['state']}, attempt {found.get('attempt')}")
            good &= found["state"] == "succeeded" and found.get("attempt", 1) == 1
        stages = [s for s in self.get(f"/v1/jobs/{chosen}/stages")["data"]]
        reused = {s["stage"]: s.get("reused") for s in stages}
        print("stages of the requeued job that were taken from records:", [s for s, r in reused.items() if r])
        good &= bool(reused.get("profile"))
        print("all ended well" if good else "SOMETHING WENT WRONG")
        return 0 if good else 1

    def heals(self, text, jobs):
        job = next((job for job in jobs if job in text), None)
        if job is None or "attempt ended" in text:
            return False
        found = self.get(f"/v1/jobs/{job}")
        return bool(found) and "training" in json.dumps(found)

    def stop(self):
        for child in reversed(self.children):
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
        for at, before in getattr(self, "saved", {}).items():
            at.unlink(missing_ok=True) if before is None else at.write_bytes(before)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--binary", default="target/release/secateur", type=pathlib.Path)
    p.add_argument("--model", required=True, type=pathlib.Path)
    p.add_argument("--steps", default=30, type=int, help="of healing")
    trial = Trial(p.parse_args())
    try:
        return trial.go()
    finally:
        trial.stop()


sys.exit(main())
