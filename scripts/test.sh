#!/usr/bin/env bash
# Every check a change must pass. The last line is the count of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${SECATEUR_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/secateur}
export PATH="$PATH:$cache/tools/bin"
engine=(--no-default-features --features engine)
service=(--no-default-features --features service)

step() { printf '\n== %s\n' "$*"; }

# wall ROOM FORBIDDEN FEATURES…: the room's dependencies must not hold the forbidden crates.
wall() {
  local room=$1 forbidden=$2 found
  shift 2
  # Apart from the test, or a failing `cargo tree` would look like a clean one.
  found=$(cargo tree --locked --edges no-dev --prefix none --format '{p}' "$@") || return
  if found=$(grep -E "^($forbidden)(-[a-z-]+)? v" <<<"$found" | sed 's/ (.*//' | sort -u); then
    printf 'the %s must not depend on:\n%s\n' "$room" "$found" >&2
    return 1
  fi
}

step "Formatting"
cargo fmt --check

step "Walls between the rooms"
wall engine 'axum|sqlx|tokio|hyper|utoipa-axum' "${engine[@]}"
wall service 'candle|tokenizers|safetensors' "${service[@]}"

step "Licences, sources and banned crates"
cargo deny --locked check bans licenses sources

step "Lints"
cargo clippy --locked --all-targets -- -D warnings
cargo clippy --locked --all-targets "${engine[@]}" -- -D warnings
cargo clippy --locked --all-targets "${service[@]}" -- -D warnings

step "Documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

step "Tests"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
cargo test --locked --no-fail-fast 2>&1 | tee "$log" || status=$?
# The same numbers by every path there is, not only by the one this processor chooses.
for kernel in bf16 avx2 plain candle; do
  SECATEUR_KERNEL=$kernel cargo test --locked -- kernel:: parity:: heal:: 2>&1 | tee -a "$log" || status=$?
done

# AMX by an emulator: the instructions are checked on every machine, the few that have them and the many that do not.
if [ "$(uname -sm)" = "Linux x86_64" ] && grep -qw avx512_bf16 /proc/cpuinfo && command -v gcc >/dev/null; then
  emulator=$(mktemp -d)
  trap 'rm -rf "$log" "$emulator"' EXIT
  gcc -O2 -Wall -Wextra -Werror -shared -fPIC -o "$emulator/amx.so" tests/emulate_amx.c
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$emulator/amx.so SECATEUR_KERNEL=amx" \
    cargo test --locked -- kernel:: parity:: heal:: 2>&1 | tee -a "$log" || status=$?
fi

# Processors that this one is not: each finds its own path and meets no instruction that it lacks. Valgrind's is one
# with AVX2 that watches the memory as well. `make sanitize` does so on the other paths.
masked() {
  local path=$1
  shift
  command -v "$1" >/dev/null || return 0
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$*" SECATEUR_EXPECTED_PATH=$path \
    cargo test --locked --lib -- kernel:: 2>&1 | tee -a "$log" || status=$?
}
if [ "$(uname -sm)" = "Linux x86_64" ]; then
  masked plain qemu-x86_64 -cpu Nehalem
  masked avx2 qemu-x86_64 -cpu Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid
  masked avx2 valgrind --quiet --error-exitcode=9
fi

# One line for all test binaries; a run without a test is no proof.
awk -v status="$status" '
  /^test result:/ { passed += $4; failed += $6; ignored += $8 }
  END {
    if (ignored) printf "%d ignored\n", ignored
    printf "%d passed, %d failed\n", passed, failed
    exit status != 0 || failed > 0 || passed == 0
  }' "$log"
