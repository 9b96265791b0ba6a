#!/usr/bin/env python3
"""Sends what schemathesis (PyPI) makes of the served OpenAPI document: examples, borders, random values, sequences of calls.

    scripts/check_api.py --binary target/debug/secateur [--examples 20] [--seed 7]

No call may be answered with 5xx or with a status, media type or body that the document does not name; what is wrong must be
refused, and a key must be asked for. The service has a key, a tiny model, a job that has ended and one that waits.
"""

import argparse
import pathlib
import subprocess
import sys

from service import Service

# A spec of the right shape may still name a model that is not here.
LEFT_OUT = "positive_data_acceptance"
# Files come under media types of their own, which the document does not list.
FILES = "/hf/{id}/resolve/{revision}/{path}"


def check(service, args, config=None, more=()):
    st = [pathlib.Path(sys.executable).parent / "st", *(["--config-file", config] if config else [])]
    return subprocess.run([
        *st, "run", f"{service.url}/openapi.json", "--header", f"Authorization: Bearer {service.key}",
        "--checks", "all", "--exclude-checks", LEFT_OUT, "--max-examples", str(args.examples), "--seed", str(args.seed),
        "--generation-database", "none", "--request-timeout", "70", "--continue-on-failure", "--suppress-health-check", "all",
        "--warnings", "off", "--exclude-path", FILES, *more,
    ], check=False, cwd=service.home.name).returncode


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model")
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    service = Service(args.binary, args.model, locked=True)
    try:
        ended = service.submit("ends", steps=0)
        assert service.wait(ended) == "succeeded"
        service.submit("waits", steps=0, resources={"labels": {"nobody": "has this"}})
        # Looks find the job that has ended; what changes one makes up its ids, or takes those it was told.
        config = pathlib.Path(service.home.name, "schemathesis.toml")
        config.write_text(f'[parameters]\n"path.id" = "{ended}"\n')
        known = ["--include-path-regex", "^/(v1/jobs|hf)/", "--include-method", "GET", "--phases", "examples,coverage,fuzzing"]
        codes = [check(service, args), check(service, args, config, known)]
        assert service.process.poll() is None, "the service has died"
    finally:
        service.stop()
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
