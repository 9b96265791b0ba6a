#!/usr/bin/env bash
# What others see of us, seen by themselves: schemathesis, a browser, Prometheus, the webhook library, MLflow, OpenTelemetry, OpenLineage, the Hub's client, S3, machines apart, the Python client.
#   scripts/check_peers.sh [BINARY]
set -euo pipefail
cd "$(dirname "$0")/.."

binary=${1:-target/debug/secateur}
cache=${SECATEUR_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/secateur}
python=$cache/check-peers/bin/python
export PYTHONDONTWRITEBYTECODE=1

for check in scripts/check_api.py scripts/check_page.py scripts/check_dashboards.py scripts/check_webhooks.py scripts/check_mlflow.py \
  scripts/check_traces.py scripts/check_lineage.py scripts/check_hub.py scripts/check_s3.py scripts/check_nodes.py \
  clients/python/tests/check_client.py; do
  printf '\n== %s\n' "$check"
  "$python" "$check" --binary "$binary"
done
