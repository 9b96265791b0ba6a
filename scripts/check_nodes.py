#!/usr/bin/env python3
"""Several machines, as namespaces of the network of this one: two workers, one database, one S3, and links that are cut. Needs root.

    scripts/check_nodes.py --binary target/debug/secateur [--moto VENV/bin/moto_server]

Each worker has a network of its own and reaches database and bucket over one link. The link of the worker that heals is cut: the other
one takes the job over and ends it, while the first one goes on computing. When the link is back, what the first one did counts for nothing.
"""

import argparse
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile

from check_s3 import BUCKET, PORT as S3_PORT, PREFIX
from service import Service, until

DATABASE_PORT = 5919
NODES = {"a": "10.77.1", "b": "10.77.2"}


def run(*command, **more):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **more).stdout


class Net:
    """A network for each node, tied to this machine by a pair of devices."""

    def __init__(self):
        self.drop()
        for node, net in NODES.items():
            run("ip", "netns", "add", f"sct-{node}")
            run("ip", "link", "add", f"sct-{node}", "type", "veth", "peer", "name", "eth0", "netns", f"sct-{node}")
            run("ip", "addr", "add", f"{net}.1/24", "dev", f"sct-{node}")
            run("ip", "link", "set", f"sct-{node}", "up")
            run("ip", "-n", f"sct-{node}", "addr", "add", f"{net}.2/24", "dev", "eth0")
            run("ip", "-n", f"sct-{node}", "link", "set", "eth0", "up")
            run("ip", "-n", f"sct-{node}", "link", "set", "lo", "up")

    def link(self, node, state):
        run("ip", "link", "set", f"sct-{node}", state)

    def drop(self):
        for node in NODES:
            subprocess.run(["ip", "netns", "del", f"sct-{node}"], capture_output=True)
            subprocess.run(["ip", "link", "del", f"sct-{node}"], capture_output=True)


class Postgres:
    """One that listens to the nodes."""

    def __init__(self):
        found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            raise SystemExit("no PostgreSQL here: apt-get install -y postgresql")
        self.bin, self.home = found[-1].parent, tempfile.mkdtemp(prefix="secateur-nodes-")
        owner = pwd.getpwnam("postgres")
        os.chown(self.home, owner.pw_uid, owner.pw_gid)
        self.as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        data = f"{self.home}/data"
        run(self.bin / "initdb", "-D", data, "--auth=trust", "-U", "secateur", **self.as_owner, cwd=self.home)
        with open(f"{data}/pg_hba.conf", "a") as hba:
            hba.writelines(f"host all all {net}.0/24 trust\n" for net in NODES.values())
        self.process = subprocess.Popen(
            [self.bin / "postgres", "-D", data, "-p", str(DATABASE_PORT), "-c", "listen_addresses=*", "-k", self.home],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.home, **self.as_owner)
        until("PostgreSQL", lambda: run(self.bin / "pg_isready", "-h", "127.0.0.1", "-p", DATABASE_PORT), 30)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        shutil.rmtree(self.home)


class Worker:
    """`secateur worker` on a node."""

    def __init__(self, binary, node, home):
        net = NODES[node]
        env = {**os.environ, "AWS_ENDPOINT_URL": f"http://{net}.1:{S3_PORT}", "RUST_LOG": "info,sqlx=warn"}
        self.log, self.data = pathlib.Path(home, f"{node}.log"), pathlib.Path(home, node)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", f"sct-{node}", binary, "worker", "--database-url", f"postgres://secateur@{net}.1:{DATABASE_PORT}/postgres",
                 "--data-dir", self.data, "--store-url", f"s3://{BUCKET}/{PREFIX}", "--threads", "1", "--lease-ttl-ms", "5000", "--backoff-ms", "100"],
                env=env, stderr=log, stdout=subprocess.DEVNULL)

    def stop(self):
        self.process.terminate()
        self.process.wait(90)


class Api(Service):
    """The API on this machine; workers are elsewhere."""

    def __init__(self, binary, model):
        super().__init__(binary, model, "--store-url", f"s3://{BUCKET}/{PREFIX}")

    def start(self):
        self.command = [self.command[0], "api", *self.command[2:self.command.index("--threads")], "--store-url", f"s3://{BUCKET}/{PREFIX}",
                        "--database-url", f"postgres://secateur@127.0.0.1:{DATABASE_PORT}/postgres"]
        super().start()


def holder(api, workers, job):
    """The node whose worker has the job."""
    said = {node: worker.log.read_text() for node, worker in workers.items()}
    busy = [w["id"] for w in api.call("/v1/workers")["data"] if w["job_id"] == job]
    found = [node for node, text in said.items() if busy and any(f"worker={w}" in text.replace("\x1b", "") for w in busy)]
    return found[0] if found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    parser.add_argument("--moto", default=str(pathlib.Path(sys.executable).with_name("moto_server")))
    args = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("ip"):
        print("nodes: not tried, for it needs root and ip (apt-get install -y iproute2)")
        return
    from check_s3 import Moto

    binary = str(pathlib.Path(args.binary).resolve())
    home = tempfile.TemporaryDirectory(prefix="secateur-nodes-")
    moto, net = Moto(args.moto, host="0.0.0.0"), Net()
    postgres = Postgres()
    api, workers = Api(binary, args.model), {}
    try:
        workers = {node: Worker(binary, node, home.name) for node in NODES}
        until("both workers", lambda: len(api.call("/v1/workers")["data"]) == 2, 60)
        job = api.submit("cut off", 1500)
        until("healing", lambda: api.call(f"/v1/jobs/{job}")["progress"]["task"].startswith("train"), 120)
        first = holder(api, workers, job)
        assert first, "nobody has the job"
        other = "b" if first == "a" else "a"
        net.link(first, "down")
        until("the other worker", lambda: holder(api, workers, job) == other, 120)
        taken = api.call(f"/v1/jobs/{job}")
        assert (taken["attempt"], taken["crashes"]) == (2, 1), taken
        # The first one computes on and knows nothing. Its link comes back while the other one is at work, or after that.
        until("the other one heals", lambda: (api.call(f"/v1/jobs/{job}")["progress"] or {"task": ""})["task"].startswith("train"), 120)
        net.link(first, "up")
        assert api.wait(job, 300) == "succeeded"
        lost = "the lease was lost"
        until("the first one to hear of it", lambda: lost in workers[first].log.read_text(), 120)
        assert lost not in workers[other].log.read_text()

        # Every event once, numbered without gaps; one end; nothing in the bucket of the attempt that did not count.
        events, after = [], 0
        while page := api.call(f"/v1/jobs/{job}/events?after={after}&limit=1000")["data"]:
            events += page
            after = page[-1]["seq"]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), "a gap"
        states = [event["state"] for event in events if event["event"] == "state_changed"]
        assert states == ["queued", "running", "queued", "running", "succeeded"], states
        # Epochs: claimed, taken away, claimed again.
        epochs = {key.split("/")[2] for key in moto.keys(f"jobs/{job}")}
        assert epochs == {"e3"}, epochs
        artifacts = api.call(f"/v1/jobs/{job}/artifacts")["data"]
        assert len(moto.keys(f"jobs/{job}")) == len(artifacts) + 1

        # A worker whose link is cut for less than its lease goes on as if nothing had been.
        short = api.submit("cut off for a moment", 1500)
        until("healing again", lambda: (api.call(f"/v1/jobs/{short}")["progress"] or {"task": ""})["task"].startswith("train"), 120)
        node = holder(api, workers, short)
        net.link(node, "down")
        subprocess.run(["sleep", "2"], check=True)
        net.link(node, "up")
        assert api.wait(short, 300) == "succeeded"
        row = api.call(f"/v1/jobs/{short}")
        assert (row["attempt"], row["crashes"]) == (1, 0), row
    finally:
        for node in NODES:
            net.link(node, "up")
        for worker in workers.values():
            worker.stop()
        api.stop()
        postgres.stop()
        moto.stop()
        net.drop()
    print(f"nodes: the link of {first} was cut while it healed; {other} took the job over and ended it in attempt 2 of one accepted end, "
          f"{len(events)} events without a gap, {len(artifacts)} files of one epoch; a cut shorter than the lease cost nothing")


if __name__ == "__main__":
    main()
