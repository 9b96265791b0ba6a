# Two commands do everything on a fresh Debian machine:
#   make demo   prune, heal and measure a real language model through the HTTP API
#   make test   every check a change must pass
# Both install what they need. The rest is for daily work.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test check check-peers check-recipes bench-peers sanitize openapi sbom clean-demo

binary = $(or $(CARGO_TARGET_DIR),target)/release/secateur

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo        prune, heal and measure SmolLM2-135M through the API; leaves demo-result/
demo:
	scripts/install.sh cargo postgres python
	cargo build --release --locked
	scripts/fetch_model.py
	scripts/demo.py --binary $(binary)

## make test        formatting, lints, walls, licences, docs and all tests
test:
	scripts/install.sh cargo postgres rust-components cargo-deny emulators
	scripts/test.sh

## make check       what to run before each commit: formatting and lints
check:
	cargo fmt
	cargo clippy --locked --all-targets -- -D warnings

## make check-peers the API, dashboard, metrics, webhooks, MLflow, traces, lineage, Hub, S3, several nodes and the Python client against real peers: schemathesis, Chromium, Prometheus, PyPI's
check-peers:
	scripts/install.sh cargo postgres python chromium prometheus peers
	cargo build --locked
	scripts/check_peers.sh $(or $(CARGO_TARGET_DIR),target)/debug/secateur

## make check-recipes docs/RECIPES.md against wandb, kfp and Airflow, as far as they run on one machine
check-recipes:
	scripts/install.sh cargo postgres recipes
	cargo build --locked
	for venv in recipes airflow; do \
	  "$${SECATEUR_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/secateur}/check-$$venv/bin/python" scripts/check_recipes.py \
	    --binary $(or $(CARGO_TARGET_DIR),target)/debug/secateur || exit 1; \
	done

## make bench-peers every stage against its peer in one run: an hour or two on a quiet machine; ARGS="--only step"
bench-peers:
	scripts/install.sh cargo python
	benches/peers/run.py $(ARGS)

## make sanitize    the kernels' tests under AddressSanitizer, on every path; builds everything anew
sanitize:
	scripts/install.sh cargo
	scripts/sanitize.sh

## make openapi     write openapi/openapi.json anew after a change of the API
openapi:
	mkdir -p openapi
	cargo run --locked -- openapi > openapi/openapi.json.new
	mv openapi/openapi.json.new openapi/openapi.json

## make sbom        a bill of materials of the release, CycloneDX JSON, on standard output
sbom:
	@scripts/sbom.sh

## make clean-demo  remove what the demo left
clean-demo:
	rm -rf demo-result
