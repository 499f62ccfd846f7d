#!/usr/bin/env bash
# Coverage-guided fuzzing of the readers with libFuzzer, on the stable compiler: LLVM's coverage pass needs no
# nightly, and the sanitizers that do are for unsafe code, of which the readers have none but the memory map.
#   scripts/fuzz.sh [TARGET|all] [SECONDS]     SECONDS of processor time for each target, in rounds of a minute
# Findings land in target/fuzz/findings (CARGO_TARGET_DIR, where that is set), what it learned in target/fuzz/corpus;
# `scripts/fuzz.sh build` only builds.
set -euo pipefail
cd "$(dirname "$0")/.."
here=${CARGO_TARGET_DIR:-target}/fuzz
targets=${1:-all}
seconds=${2:-600}
if [ "$targets" = all ]; then targets="pickle zip gguf safetensors config tokenizer sqlite trace"; fi

# Named, so that build scripts are not instrumented.
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
    cargo build --release --manifest-path tests/fuzz/Cargo.toml --target-dir "$here" --target "$host"
if [ "$targets" = build ]; then exit; fi

# Processor seconds of the children that have ended: a busy machine does not shorten a run.
# A subshell would count its own.
used() {
    times >"$here/times-$target"
    used=$(awk 'NR == 2 { split($1, m, /[ms]/); print int(60 * m[1] + m[2]) }' "$here/times-$target")
}

mkdir -p "$here/findings"
for target in $targets; do
    mkdir -p "$here/corpus/$target"
    echo "== $target, $seconds s of processor"
    inputs=("$here/corpus/$target" "tests/fuzz/corpus/$target")
    [ -d "tests/fuzz/findings/$target" ] && inputs+=("tests/fuzz/findings/$target")
    used && before=$used
    while [ $((used - before)) -lt "$seconds" ]; do
        # One thread: what one input allocates is not mixed up with what another does.
        DECDEC_FUZZ_TARGET=$target RAYON_NUM_THREADS=1 "$here/$host/release/fuzz" \
            "${inputs[@]}" \
            -max_total_time=60 -timeout=10 -rss_limit_mb=1024 -max_len=16384 \
            -artifact_prefix="$here/findings/$target-" -print_final_stats=1 -verbosity=1
        used
    done
    echo "== $target took $((used - before)) s of processor"
done
