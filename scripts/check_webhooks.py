#!/usr/bin/env python3
"""Verifies webhooks with the library that Standard Webhooks publishes (PyPI: standardwebhooks), over kills.

    scripts/check_webhooks.py --binary target/debug/secateur

The receiver goes away and comes back, the service is killed in the middle, the secret is rotated. In the end every state
of every job has come, each message with one body, each signed.
"""

import argparse
import collections
import json
import pathlib
import time

from receiver import Receiver
from service import Service, until
from standardwebhooks.webhooks import Webhook, WebhookVerificationError


class Verifier(Receiver):
    """Verifies what comes and keeps it."""

    def __init__(self):
        super().__init__(self.verify)
        self.secrets, self.bodies, self.wrong = [], collections.defaultdict(list), 0

    def verify(self, _method, _path, headers, body):
        for secret in self.secrets:
            try:
                Webhook(secret).verify(body, headers)
            except WebhookVerificationError:
                self.wrong += 1
                return 401, b""
        self.bodies[headers["webhook-id"]].append(body)
        return 200, b""

    def states(self):
        """States by job, from messages that are each counted once."""
        found = collections.defaultdict(list)
        for bodies in self.bodies.values():
            assert len(set(bodies)) == 1, "one id, two bodies"
            message = json.loads(bodies[0])
            if message["type"].startswith("job."):
                found[message["data"]["job_id"]].append(message["type"])
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    receiver = Verifier()
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
