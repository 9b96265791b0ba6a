#!/usr/bin/env python3
"""Asks a real Prometheus every question of the Grafana dashboard and of the alert rules.

    scripts/check_dashboards.py --binary target/debug/secateur

Needs `prometheus` and `promtool` (Debian's package prometheus). Starts a service, has it run jobs and tell a webhook,
scrapes it, and fails where a panel stays empty. Where grafana-foundation-sdk (PyPI) is at hand, the dashboard is also
read by Grafana's own types.
"""

import argparse
import http.server
import json
import math
import pathlib
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request

from service import Service

DEPLOY = pathlib.Path(__file__).resolve().parent.parent / "deploy"
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: secateur
    static_configs: [{{targets: ["{target}"]}}]
"""


class Ok(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def ask(url, query):
    query = query.replace("$__rate_interval", "1m").replace("$__interval", "15s")
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as answer:
        return json.load(answer)["data"]["result"]


def panels(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def check_files(dashboard):
    subprocess.run(["promtool", "check", "rules", "rules.yml"], cwd=DEPLOY / "prometheus", check=True)
    subprocess.run(["promtool", "test", "rules", "rules_test.yml"], cwd=DEPLOY / "prometheus", check=True)
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=DEPLOY / "prometheus", check=True)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)), "two panels have one id"
    try:
        from grafana_foundation_sdk.models.dashboard import Dashboard
    except ImportError:
        print("grafana-foundation-sdk is not here: the dashboard is not read by Grafana's types")
        return
    read = Dashboard.from_json(dashboard)
    assert read.title == "secateur" and len(read.panels) == len(ids)
    print(f"Grafana's types read the dashboard: {len(ids)} panels")


def work(service):
    """Enough for every metric: jobs that succeed, one that fails, one that goes on while it is looked at."""
    service.call("/v1/webhook_endpoints", {"url": receiver()})
    for name in ["first", "second", "third"]:
        service.wait(service.submit(name, 20))
    service.wait(service.submit("the same again", 20))
    service.submit("goes on", 1_000_000)


def receiver():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ok)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def check_queries(url, dashboard):
    """Every panel has data, and numbers among them."""
    empty = {}
    for _ in range(60):
        empty = {}
        for title, query in panels(dashboard):
            values = [float(row["value"][1]) for row in ask(url, query)]
            if not any(math.isfinite(value) for value in values):
                empty[query] = title
        if not empty:
            break
        time.sleep(1)
    for query, title in empty.items():
        print(f"EMPTY {title}: {query}")
    if empty:
        raise SystemExit(1)
    print(f"{len(list(panels(dashboard)))} queries of {len(dashboard['panels'])} panels have data")


def check_rules(url):
    with urllib.request.urlopen(f"{url}/api/v1/rules") as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    wrong = [rule for rule in rules if rule["health"] != "ok" or rule["state"] == "firing"]
    assert rules and not wrong, wrong
    print(f"{len(rules)} rules are evaluated, none fires on a service that is well")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    dashboard = json.loads((DEPLOY / "grafana/secateur.json").read_text())
    check_files(dashboard)
    service = Service(args.binary, args.model, "--webhooks-inside")
    home = tempfile.TemporaryDirectory(prefix="secateur-prometheus-")
    prometheus = None
    try:
        config = pathlib.Path(home.name, "prometheus.yml")
        rules = DEPLOY / "prometheus/rules.yml"
        config.write_text(CONFIG.format(rules=rules, target=service.url.removeprefix("http://")))
        port = int(service.port) + 1
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={home.name}/data",
             f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
        )
        time.sleep(3)
        with urllib.request.urlopen(f"{service.url}/metrics") as answer:
            subprocess.run(["promtool", "check", "metrics"], input=answer.read(), check=True)
        work(service)
        check_queries(f"http://127.0.0.1:{port}", dashboard)
        check_rules(f"http://127.0.0.1:{port}")
    finally:
        if prometheus:
            prometheus.terminate()
            prometheus.wait()
        service.stop()
        home.cleanup()


if __name__ == "__main__":
    main()
