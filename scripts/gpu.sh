#!/usr/bin/env bash
# Tests, compute-sanitizer and benchmarks on a machine with an NVIDIA GPU, then a table of what came of each.
#
#   scripts/gpu.sh                      # everything
#   scripts/gpu.sh tests                # or: sanitizer, benches, load; several may be named
#   DECDEC_BIN_DIR=DIR scripts/gpu.sh   # programs from scripts/gpu-bundle.sh, no compiler needed
#
# Logs and tables go to DECDEC_RUN_DIR (target/gpu-run). DECDEC_TEST_DEVICES names what the tests run on; by default
# the CPU, CUDA, and Vulkan where it is installed. DECDEC_TEST_CASES is how many random cases (10000).
set -uo pipefail
cd "$(dirname "$0")/.."

bin=${DECDEC_BIN_DIR:-${CARGO_TARGET_DIR:-target}/gpu}
[ -n "${DECDEC_BIN_DIR:-}" ] || scripts/gpu-bundle.sh "$bin" || exit 1
bin=$(realpath "$bin")
out=${DECDEC_RUN_DIR:-${CARGO_TARGET_DIR:-target}/gpu-run}
mkdir -p "$out"
[ ! -d "$bin/data" ] || {
    export DECDEC_REFERENCE_DIR=${DECDEC_REFERENCE_DIR:-$bin/data}
    export DECDEC_GOLDEN_DIR=${DECDEC_GOLDEN_DIR:-$DECDEC_REFERENCE_DIR/golden}
}
export CARGO_BIN_EXE_decdec=$bin/decdec
vulkan=$(ldconfig -p 2>/dev/null | grep -q libvulkan.so.1 && echo ,wgpu)
export DECDEC_TEST_DEVICES=${DECDEC_TEST_DEVICES:-cpu,cuda$vulkan}
sanitizer=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer || true)
cuda=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
echo "# ${cuda:-no nvidia-smi}, commit $(cat "$bin/commit" 2>/dev/null), devices $DECDEC_TEST_DEVICES" | tee "$out/machine.txt"

rows=()
failures=0

# step NAME COMMAND...: runs it, keeps its output as NAME.log, and a row for the table.
step() {
    local name=$1 start=$SECONDS status=ok note skipped
    shift
    printf '== %s: %s\n' "$name" "${*/#$bin\//}"
    if ! "$@" >"$out/$name.log" 2>&1; then
        status=FAILED
        failures=$((failures + 1))
        tail -n 25 "$out/$name.log"
    fi
    note=$(grep -h -E '^test result|ERROR SUMMARY|RACECHECK SUMMARY' "$out/$name.log" | sed 's/; 0 measured.*//; s/^=* //' | tail -n 1)
    skipped=$(grep -c '^skipped: ' "$out/$name.log")
    [ "$skipped" = 0 ] || note="$note; $skipped said that they were skipped"
    rows+=("$(printf '%-28s %-7s %5d s  %s' "$name" "$status" $((SECONDS - start)) "$note")")
}

tests() {
    step backend "$bin/backend" --nocapture
    step families "$bin/families" --nocapture
    for name in cuda_kernels cuda_attention golden cuda_decode cuda_layers cuda_faults cuda_waits backend_wgsl reference_read smollm2; do
        step "$name" "$bin/$name" --nocapture --test-threads 1
    done
    # Residuals in memory that the driver allocates, as where ordinary memory cannot be pinned.
    DECDEC_PINNED=alloc step pinned-by-driver "$bin/cuda_kernels" --nocapture the_residual_product_alone
}

# Small shapes: a sanitizer runs a kernel hundreds of times as slowly.
sanitizer() {
    if [ -z "$sanitizer" ]; then
        rows+=("$(printf '%-28s %-7s          no compute-sanitizer on this machine' sanitizer skipped)")
        return
    fi
    local kernels=(one_hot_gives_a_column compensated_products the_residual_product_alone not_a_number_comes_out)
    for tool in memcheck racecheck; do
        DECDEC_TEST_DEVICES=cuda step "$tool-kernels" "$sanitizer" --tool $tool --error-exitcode 1 \
            "$bin/cuda_kernels" --test-threads 1 "${kernels[@]}"
        DECDEC_TEST_DEVICES=cuda DECDEC_TEST_CASES=60 step "$tool-cases" "$sanitizer" --tool $tool \
            --error-exitcode 1 "$bin/backend" --test-threads 1 random_cases cuda::attention cuda::greedy_sampling
    done
    # Not racecheck: of layers it reports the sums of a compensation, across a barrier of the whole block (benches/README.md).
    DECDEC_TEST_DEVICES=cuda step memcheck-layers "$sanitizer" --tool memcheck --error-exitcode 1 \
        "$bin/cuda_layers" --test-threads 1 a_few_layers_in_one_launch texts_do_not_depend_on_those_before
}

benches() {
    step pack "$bin/pack"
    step gemv "$bin/gemv" --bits 3,4
    step dec "$bin/dec" --bits 3
    DECDEC_PINNED=alloc step dec-pinned-by-driver "$bin/dec" --k-chunk 8 --n-tb 16,32
    step ops "$bin/generate" --ops 1000
    step generate-dec "$bin/generate" --k-chunk 0,8,0/0/8/8 --n-tb 16,32 --prompt 1,512
    for format in ap lutgemm; do
        for bits in 3 4; do
            step "generate-$format$bits" "$bin/generate" --format $format --bits $bits --prompt 1
        done
    done
    # Whole tokens of the models that are known by name, and where their time goes operation by operation.
    local preset
    for preset in Llama-3.2-1B-Instruct Llama-3.2-3B-Instruct Qwen2.5-7B-Instruct Meta-Llama-3-8B-Instruct Qwen3-8B \
        gemma-3-12b-it phi-4 Phi-3-medium-4k-instruct Qwen3-14B Mistral-Small-3.1-24B-Instruct-2503; do
        step "preset-$preset" "$bin/decdec" bench --checkpoint-path random:0 --backend ap --model-name $preset \
            --bitwidth 3 --device cuda --n-tbs 8 --k-chunks 0 0 0 0 --tokens 200 --timeline
    done
}

# How long a model takes to load: kernels compiled anew, from the cache, and with the driver's own pinned memory.
load() {
    local model=(--model-name Meta-Llama-3-8B-Instruct --bitwidth 3 --num-samples 1 --max-new-tokens 8 --device cuda)
    local cache
    cache=$(mktemp -d)
    loaded() {
        RUST_LOG=decdec=debug DECDEC_CACHE_DIR=$cache step "$1" "$bin/decdec" generate \
            --checkpoint-path random:0 --backend ap "${model[@]}" --n-tbs 16 --k-chunks 8 8 8 8
        grep -h -E '^ *(INFO|DEBUG)' "$out/$1.log"
    }
    loaded load-cold
    loaded load-warm
    DECDEC_PINNED=alloc loaded load-pinned-by-driver
    # A checkpoint of random numbers, from the page cache.
    RUST_LOG=decdec=debug DECDEC_CACHE_DIR=$cache step load-checkpoint "$bin/load"
    cat "$out/load-checkpoint.log"
    rm -rf "$cache"
}

[ $# -gt 0 ] || set -- tests sanitizer load benches
for part in "$@"; do
    case $part in
        tests | sanitizer | load | benches) "$part" ;;
        *) echo "error: $part, tests, sanitizer, load and benches are known" >&2; exit 1 ;;
    esac
done

{
    printf '\n%-28s %-7s %7s\n' step result time
    printf '%s\n' "${rows[@]}"
} | tee "$out/summary.txt"
exit $((failures > 0))
