#!/usr/bin/env bash
# The tests of the kernels under AddressSanitizer, on every path that this processor has, and AMX by an emulator.
# The sanitizer is unstable; its runtime comes with the stable toolchain, which RUSTC_BOOTSTRAP lets use it.
set -euo pipefail
cd "$(dirname "$0")/.."

target=x86_64-unknown-linux-gnu
export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/sanitize

kernels() { cargo test --locked --target $target --no-default-features --features engine --lib -- kernel::; }

for path in bf16 avx512 avx2 plain; do
  echo "== $path"
  SECATEUR_KERNEL=$path kernels
done

if grep -qw avx512_bf16 /proc/cpuinfo && command -v gcc >/dev/null; then
  emulator=$(mktemp -d)
  trap 'rm -rf "$emulator"' EXIT
  gcc -O2 -shared -fPIC -o "$emulator/amx.so" tests/emulate_amx.c
  echo "== amx"
  # The emulator is loaded before the sanitizer's runtime, which would rather be first.
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$emulator/amx.so ASAN_OPTIONS=verify_asan_link_order=0 \
    SECATEUR_KERNEL=amx SECATEUR_EXPECTED_PATH=amx" kernels
fi
