#!/usr/bin/env bash
# Format, lints, docs, and all tests on DECDEC_TEST_DEVICES (cpu and a software Vulkan device by default).
#
# The last lines say where the time went, what was skipped and why, and "N passed, N failed, N skipped"; a step without
# tests counts as one (scripts/tally.sh). With CI=true only those skips pass that scripts/allowed-skips names.
set -uo pipefail
cd "$(dirname "$0")/.."
export DECDEC_TEST_DEVICES=${DECDEC_TEST_DEVICES:-cpu,wgpu}
# Mesa complains on stderr where there is no session.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
out=$(realpath -m "${CARGO_TARGET_DIR:-target}")/test
rm -rf "$out"
mkdir -p "$out"
# One profile and one set of features for everything, so that nothing is built twice; scripts/demo.sh has the same.
export CARGO_TERM_COLOR=never
build=(--release --features reference-wgpu)
times=

# step NAME COMMAND...: runs it, keeps what it says, goes on if it fails.
step() {
    local name=$1 start=$SECONDS status=0
    shift
    printf '== %s: %s\n' "$name" "$*"
    DECDEC_SKIPS=$out/$name.skips "$@" 2>&1 | tee "$out/$name.log" || status=1
    echo $status >"$out/$name.status"
    times+="$name $((SECONDS - start)) s, "
}

# SmolLM2, and NVIDIA's compilers: every CUDA kernel is compiled for every architecture, GPU or not.
fetch() {
    scripts/model.sh && scripts/clients.sh && scripts/cuda-toolchain.sh tests && CUDA_SERIES=12.8 scripts/cuda-toolchain.sh tests
}

needed=(cc c++ pip sqlite3 chromium)
[[ $DECDEC_TEST_DEVICES != *wgpu* ]] || needed+=(vulkan)
step packages scripts/packages.sh "${needed[@]}"
# While cargo builds.
(
    fetch >"$out/downloads.log" 2>&1
    status=$?
    echo $status >"$out/downloads.status"
    exit $status
) &
fetching=$!
trap 'kill $fetching 2>/dev/null' EXIT

step format cargo fmt --check
step lints cargo clippy "${build[@]}" --all-targets -- -D warnings
# A library for other programs, without what only this one needs.
step library cargo clippy --release --no-default-features --lib -- -D warnings
step docs env RUSTDOCFLAGS="-D warnings" cargo doc "${build[@]}" --no-deps
step build cargo test "${build[@]}" --no-run
wait $fetching || cat "$out/downloads.log"
step tests env DECDEC_CUDA_LIBRARIES="${DECDEC_CUDA_LIBRARIES:-.cache/cuda/lib}" \
    DECDEC_PYTHON="${DECDEC_PYTHON:-.cache/clients/bin/python}" DECDEC_ROUTERS="${DECDEC_ROUTERS:-.cache}" \
    cargo test "${build[@]}" --no-fail-fast
step examples scripts/examples.sh
# The oldest series whose NVRTC knows sm_120, too; of the architectures, the newest two.
step cuda-12 env DECDEC_CUDA_LIBRARIES=.cache/cuda-12.8/lib DECDEC_TEST_ARCHITECTURES=sm_90,sm_120 \
    cargo test "${build[@]}" --lib backend::cuda::compiler

printf '\ntime: %s%d s in all\n' "$times" $SECONDS
scripts/tally.sh "$out"
