#!/usr/bin/env bash
# Installs what is missing on a fresh Debian machine, and nothing that is there already.
#   scripts/install.sh [cargo] [postgres] [python] [rust-components] [cargo-deny] [emulators] [chromium] [prometheus] [peers] [recipes]
set -euo pipefail

cargo_deny_version=0.20.2
cache=${SECATEUR_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/secateur}

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "needs root for: $*. Run it as root once, then start again."
  fi
}

apt_install() {
  command -v apt-get >/dev/null || die "no apt-get here: install the equivalent of '$*' by hand, then start again"
  say "apt-get install $*"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
  # The package lists of a fresh machine are empty or old.
  as_root "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1 && return
  as_root "${apt[@]}" update >&2
  as_root "${apt[@]}" install -y --no-install-recommends "$@" >&2
}

# The places where `secateur up` looks, in its order.
has_postgres() {
  local bin
  for bin in "${SECATEUR_PG_BIN:-}" "$(pg_config --bindir 2>/dev/null || true)" /usr/lib/postgresql/*/bin; do
    [ -n "$bin" ] && [ -x "$bin/initdb" ] && [ -x "$bin/postgres" ] && return
  done
  command -v initdb >/dev/null && command -v postgres >/dev/null
}

need_cargo() {
  command -v cargo >/dev/null || die "no cargo: install Rust 1.95 or newer (rustup), then start again"
  command -v cc >/dev/null || apt_install build-essential
}

need_postgres() { has_postgres || apt_install postgresql; }

need_python() {
  command -v python3 >/dev/null || apt_install python3
  # Debian ships venv without the pip it needs.
  python3 -c 'import venv, ensurepip' 2>/dev/null || apt_install python3-venv
}

need_rust_components() {
  cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 && return
  command -v rustup >/dev/null || die "no rustfmt or clippy: install the components for your toolchain, then start again"
  rustup component add rustfmt clippy
}

need_cargo_deny() {
  command -v cargo-deny >/dev/null && return
  [ -x "$cache/tools/bin/cargo-deny" ] && return
  say "building cargo-deny $cargo_deny_version once, kept in $cache/tools"
  # Unoptimised: it reads one lock file, and builds in a third of the time.
  env -u CARGO_TARGET_DIR cargo install --quiet --locked --debug --no-default-features \
    --root "$cache/tools" --version "$cargo_deny_version" cargo-deny
}

# Other processors, for the tests of the kernels. Only for the one architecture that has several paths.
need_emulators() {
  [ "$(uname -sm)" = "Linux x86_64" ] || return 0
  local missing=()
  command -v qemu-x86_64 >/dev/null || missing+=(qemu-user)
  command -v valgrind >/dev/null || missing+=(valgrind)
  [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

need_chromium() { command -v chromium >/dev/null || command -v google-chrome >/dev/null || apt_install chromium; }
need_prometheus() { command -v promtool >/dev/null || apt_install prometheus; }

# What our results are checked with, from PyPI; in an environment of its own.
need_peers() {
  need_python
  local venv=$cache/check-peers
  local packages=(mlflow standardwebhooks grafana-foundation-sdk httpx pydantic opentelemetry-proto openlineage-python huggingface_hub 'moto[server]' boto3 schemathesis)
  [ "$(cat "$venv/packages" 2>/dev/null)" = "${packages[*]}" ] && return
  say "pip install mlflow and others into $venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet "${packages[@]}"
  echo "${packages[*]}" > "$venv/packages"
}

# What recipes are tried with; Airflow wants versions of its own.
need_recipes() {
  need_python
  local venv
  for venv in recipes airflow; do
    [ -x "$cache/check-$venv/bin/python" ] || python3 -m venv "$cache/check-$venv"
  done
  say "pip install wandb, kfp and apache-airflow into $cache"
  "$cache/check-recipes/bin/pip" install --quiet wandb kfp pyyaml httpx pydantic
  "$cache/check-airflow/bin/pip" install --quiet apache-airflow
}

for what in "$@"; do
  case $what in
    cargo) need_cargo ;;
    postgres) need_postgres ;;
    python) need_python ;;
    rust-components) need_rust_components ;;
    cargo-deny) need_cargo_deny ;;
    emulators) need_emulators ;;
    chromium) need_chromium ;;
    prometheus) need_prometheus ;;
    peers) need_peers ;;
    recipes) need_recipes ;;
    *) die "unknown: $what" ;;
  esac
done
