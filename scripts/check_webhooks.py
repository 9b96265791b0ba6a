#!/usr/bin/env python3
"""Verifies webhooks with the library that Standard Webhooks publishes (PyPI: standardwebhooks), over kills.

    scripts/check_webhooks.py --binary target/debug/secateur

The receiver goes away and comes back, the service is killed in the middle, the secret is rotated. In the end every state
of every job has come, each message with one body, each signed.
"""

import argparse
import collections
import http.server
import json
import pathlib
import threading
import time

from service import Service
from standardwebhooks.webhooks import Webhook, WebhookVerificationError


class Receiver:
    """Verifies what comes and keeps it; may be stopped and started at the same port."""

    def __init__(self):
        self.secrets, self.port, self.bodies, self.wrong = [], 0, collections.defaultdict(list), 0

    def start(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200 if outer.take(dict(self.headers.items()), body) else 401)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def take(self, headers, body):
        headers = {name.lower(): value for name, value in headers.items()}
        for secret in self.secrets:
            try:
                Webhook(secret).verify(body, headers)
            except WebhookVerificationError:
                self.wrong += 1
                return False
        self.bodies[headers["webhook-id"]].append(body)
        return True

    def states(self):
        """States by job, from messages that are each counted once."""
        found = collections.defaultdict(list)
        for bodies in self.bodies.values():
            assert len(set(bodies)) == 1, "one id, two bodies"
            message = json.loads(bodies[0])
            if message["type"].startswith("job."):
                found[message["data"]["job_id"]].append(message["type"])
        return found


def until(what, holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"after {seconds} s still not: {what}")
        time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    receiver = Receiver()
    receiver.start()
    service = Service(args.binary, args.model, "--webhooks-inside", "--sink-patience", "0.05")
    try:
        made = service.call("/v1/webhook_endpoints", {"url": f"http://127.0.0.1:{receiver.port}/"})
        at = f"/v1/webhook_endpoints/{made['id']}"
        receiver.secrets = [made["secret"]]
        service.call(at + "/ping", method="POST")
        until("a ping", lambda: len(receiver.bodies) == 1)

        jobs = [service.submit("all is well", 0)]
        service.wait(jobs[0])
        receiver.stop()
        jobs += [service.submit(f"nobody listens {i}", 0) for i in range(3)]
        for job in jobs:
            service.wait(job)
        service.kill()
        service.start()
        jobs.append(service.submit("after the kill", 0))
        service.wait(jobs[-1])
        receiver.start()

        wanted = sorted(["job.queued", "job.running", "job.succeeded"])
        until("every state of every job", lambda: all(sorted(receiver.states()[job]) == wanted for job in jobs))

        # While both secrets count, a receiver that knows either is content: here it wants both.
        receiver.secrets.append(service.call(at + "/rotate", method="POST")["secret"])
        service.call(at + "/ping", method="POST")
        until("a ping signed twice", lambda: len(receiver.bodies) == 2 + 3 * len(jobs))
        log = service.call(at + "/deliveries?limit=100")["data"]
        assert all(d["state"] == "delivered" for d in log) and len(log) == 2 + 3 * len(jobs)
        assert any(len(d["tries"]) > 1 for d in log), "nothing was tried again"
        assert receiver.wrong == 0, f"{receiver.wrong} signatures were wrong"
    finally:
        service.stop()
    tries = sum(len(d["tries"]) for d in log)
    print(f"webhooks: {len(log)} messages of {len(jobs)} jobs came, none missing, all signed, in {tries} tries; "
          f"the receiver was away and the service killed in between")


if __name__ == "__main__":
    main()
