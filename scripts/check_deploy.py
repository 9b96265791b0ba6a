#!/usr/bin/env python3
"""Renders the Helm chart with the values that matter and checks everything that comes out.

    python3 scripts/check_deploy.py [--node DIR]

Needs helm-python-sdk, kubernetes-validate and PyYAML. Kinds of Kubernetes itself are held to its schemas, nothing left
over; what KEDA and the Prometheus operator bring is checked through the npm packages @kubernetes-models/keda and
@kubernetes-models/prometheus-operator in DIR, and left out, with a word, without it. Also finds out whether the schema
of the values refuses what it should. Exits with 1 when anything is wrong.
"""
import argparse
import json
import pathlib
import subprocess
import sys

import kubernetes_validate
import yaml
from helm_python import Chart

CHART = pathlib.Path(__file__).resolve().parent.parent / "deploy/helm/secateur"
KUBERNETES = "1.31"
GOOD = {
    "defaults": {},
    "pool": {"worker": {"mode": "pool", "replicas": 3, "kueueQueue": "gpus"}},
    "processor": {"worker": {"mode": "scaledjob", "device": "cpu", "resources": {}, "kueueQueue": "cpus"}},
    "everything": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "models": {"existingClaim": "models"}, "store": {"existingClaim": "store"},
        "api": {"autoscaling": {"enabled": False}, "annotations": {"a": "b"}},
        "imagePullSecrets": [{"name": "pull"}],
        "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"team": "ml"}}}]},
        "worker": {"scratch": {"storageClass": "fast", "size": "1Ti"}, "nodeSelector": {"gpu": "a100"},
                   "tolerations": [{"key": "gpu", "operator": "Exists"}], "env": [{"name": "A", "value": "b"}],
                   "priorityClass": "low"},
    },
    "bucket": {"store": {"s3": {"url": "s3://finished/team", "secret": "s3"}}},
    "another S3": {"store": {"s3": {"url": "s3://finished", "endpoint": "http://minio:9000", "port": 9000, "proxy": True}}, "worker": {"mode": "pool"}},
    "nothing": {"worker": {"mode": "none"}, "networkPolicy": {"enabled": False}},
}
BAD = {
    "unknown key": {"workers": {}},
    "unknown mode": {"worker": {"mode": "fleet"}},
    "device": {"worker": {"device": "gpu"}},
    "no secret": {"database": {"secret": ""}},
    "no bucket": {"store": {"s3": {"url": "finished"}}},
    "password in values": {"database": {"password": "x"}},
}
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
# An import is found from the working directory only by way of a file, hence the URL.
NODE = """
import {readFileSync} from "node:fs";
const here = (name) => import(import.meta.resolve(name, `file://${process.cwd()}/_.mjs`));
const all = {"keda.sh/v1alpha1": await here("@kubernetes-models/keda/keda.sh/v1alpha1"),
             "monitoring.coreos.com/v1": await here("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1")};
for (const doc of JSON.parse(readFileSync(0, "utf8"))) new all[doc.apiVersion][doc.kind](doc).validate();
"""


def render(values):
    rendered = Chart.load(CHART).render(values, name="test", namespace="default")
    # What only other templates use renders to nothing.
    return [doc for text in rendered.values() for doc in yaml.safe_load_all(text) if doc]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--node", type=pathlib.Path, help="directory with the npm packages")
    args = p.parse_args()
    wrong, custom = [], []
    for name, values in GOOD.items():
        docs = render(values)
        kinds = []
        for doc in docs:
            kinds.append(doc["kind"])
            if doc["apiVersion"] in CUSTOM:
                custom.append(doc)
                continue
            try:
                kubernetes_validate.validate(doc, KUBERNETES, strict=True)
            except Exception as error:  # noqa: BLE001: whatever it is, it is wrong
                wrong.append(f"{name}: {doc['kind']} {doc['metadata']['name']}: {error}")
        print(f"{name}: {', '.join(sorted(kinds))}")
    for name, values in BAD.items():
        try:
            render(values)
            wrong.append(f"{name}: was not refused")
        except Exception as error:  # noqa: BLE001
            print(f"{name}: refused ({str(error).splitlines()[0][:90]})")
    if args.node:
        run = lambda docs: subprocess.run(["node", "--input-type=module", "-e", NODE], input=json.dumps(docs),
                                          cwd=args.node, text=True, capture_output=True)
        done = run(custom)
        if done.returncode:
            wrong.append(done.stderr)
        # What finds nothing wrong may find nothing at all.
        broken = [{**doc, "spec": {}} for doc in custom]
        if not all(run([doc]).returncode for doc in broken):
            wrong.append("the schemas of KEDA and the Prometheus operator take an empty spec")
        print(f"{len(custom)} documents of KEDA and the Prometheus operator checked")
    else:
        print(f"{len(custom)} documents of KEDA and the Prometheus operator NOT checked: give --node")
    print("\n".join(wrong) or "all is right")
    return 1 if wrong else 0


sys.exit(main())
