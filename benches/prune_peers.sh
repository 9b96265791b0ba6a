#!/usr/bin/env bash
# Time of `secateur prune` against `cp -r` of its result, and against mergekit's passthrough where it is installed.
#   benches/prune_peers.sh BINARY DIR [MERGEKIT_YAML]     DIR: room for 8 GB; made by us, left to you
set -euo pipefail
binary=$1 dir=$2 mergekit=${3:-}
here=$(dirname "$0")
mkdir -p "$dir"
[ -d "$dir/base" ] || python3 "$here/make_checkpoint.py" tinyllama-1.1b "$dir/base" --random
cat > "$dir/passthrough.yaml" <<END
slices:
  - sources: [{model: $dir/base, layer_range: [0, 10]}]
  - sources: [{model: $dir/base, layer_range: [16, 22]}]
merge_method: passthrough
dtype: bfloat16
END
timed() {
  local name=$1 start end
  shift
  sync
  start=$(date +%s.%N)
  "$@" >/dev/null 2>&1
  end=$(date +%s.%N)
  awk -v name="$name" -v start="$start" -v end="$end" 'BEGIN { printf "%s %.2f\n", name, end - start }'
}
for _ in 1 2 3 4 5 6 7; do
  rm -rf "$dir/pruned" "$dir/copy" "$dir/merged"
  timed prune "$binary" prune "$dir/base" --drop 10-15 --out "$dir/pruned"
  timed cp cp -r "$dir/pruned" "$dir/copy"
  [ -z "$mergekit" ] || timed mergekit "$mergekit" "$dir/passthrough.yaml" "$dir/merged" --lazy-unpickle
done | sort | awk '
  { values[$1] = values[$1] " " $2 }
  END { for (name in values) { n = split(values[name], v, " "); printf "%-9s median %.2f s of %d\n", name, v[int((n + 1) / 2)], n } }'
