#!/usr/bin/env bash
# Format, lints, docs, and all tests on DECDEC_TEST_DEVICES (cpu and a software Vulkan device by default).
set -euo pipefail
cd "$(dirname "$0")/.."
export DECDEC_TEST_DEVICES=${DECDEC_TEST_DEVICES:-cpu,wgpu}

if [[ $DECDEC_TEST_DEVICES == *wgpu* ]] && ! { ldconfig -p | grep libvulkan.so.1 && ls /usr/share/vulkan/icd.d/*.json; } \
    >/dev/null 2>&1; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get -qq update
    $sudo apt-get -qq install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null
fi
scripts/model.sh >/dev/null
# Every CUDA kernel is compiled for every architecture, GPU or not.
scripts/cuda-toolchain.sh tests
export DECDEC_CUDA_LIBRARIES=${DECDEC_CUDA_LIBRARIES:-.cache/cuda/lib}
# Mesa complains on stderr where there is no session.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}

cargo fmt --check
cargo clippy --release --all-targets --features reference-wgpu -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --features reference-wgpu
cargo test --release --features reference-wgpu
# The oldest series whose NVRTC knows sm_120, too; of the architectures, the newest two.
CUDA_SERIES=12.8 scripts/cuda-toolchain.sh tests
DECDEC_CUDA_LIBRARIES=.cache/cuda-12.8/lib DECDEC_TEST_ARCHITECTURES=sm_90,sm_120 \
    cargo test --release --features reference-wgpu --lib backend::cuda::compiler
