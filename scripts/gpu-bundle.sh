#!/usr/bin/env bash
# Builds what scripts/gpu.sh runs, into a folder for a machine that has a GPU and no compiler.
#
#   scripts/gpu-bundle.sh DIR
#   there, in a copy of this repository: DECDEC_BIN_DIR=DIR scripts/gpu.sh
#
# DIR gets the program, the tests and benchmarks that a GPU matters to, each named after its target, and in data/ the
# known answers (DECDEC_REFERENCE_DIR, or those of the repository).
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?usage: scripts/gpu-bundle.sh DIR}
tests=(cuda_kernels cuda_attention cuda_decode cuda_layers cuda_faults cuda_waits golden backend families backend_wgsl reference_read smollm2)
benches=(gemv dec generate rows load pack token)
mkdir -p "$dir"

# Prints "name path" of each program that cargo made.
made() {
    cargo "$@" --features reference-wgpu --message-format json-render-diagnostics |
        python3 -c 'import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable"):
        print(made["target"]["name"], made["executable"])'
}

take() {
    while read -r name path; do
        install -m 755 "$path" "$dir/$name.new"
        strip "$dir/$name.new" 2>/dev/null || true
        mv "$dir/$name.new" "$dir/$name"
    done
}

made build --release --bin decdec | take
made test --release --no-run "${tests[@]/#/--test=}" | grep -v '^decdec ' | take
made bench --no-run "${benches[@]/#/--bench=}" | grep -v '^decdec ' | take
for name in decdec "${tests[@]}" "${benches[@]}"; do
    [ -x "$dir/$name" ] || { echo "error: $name was not built" >&2; exit 1; }
done

answers=${DECDEC_REFERENCE_DIR:-tests/data/reference}
mkdir -p "$dir/data"
cp -r "$answers"/golden "$answers"/tiny-* "$answers"/smollm2 "$dir/data/"
git rev-parse --short HEAD >"$dir/commit" 2>/dev/null || true
du -sh "$dir" >&2
