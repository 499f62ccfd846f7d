#!/usr/bin/env bash
# Unpacks NVIDIA's compilers from PyPI into .cache/cuda: nvcc, ptxas, NVRTC, a disassembler and CUPTI, no GPU needed.
#
#   scripts/cuda-toolchain.sh             # CUDA 13.0
#   scripts/cuda-toolchain.sh tests       # only what tests need, NVRTC and CUPTI, if it is not there yet
#   CUDA_SERIES=12.8 scripts/cuda-toolchain.sh
#
# Tests and benches find libnvrtc and libcupti there through DECDEC_CUDA_LIBRARIES=.cache/cuda/lib.
set -euo pipefail
cd "$(dirname "$0")/.."

series=${CUDA_SERIES:-13.0}
case $series in
    13.*) suffix="" extra=nvidia-nvvm crt=nvidia-cuda-crt ;;
    12.*) suffix="-cu12" extra="" crt="" ;;
    *) echo "CUDA series $series, 12.x or 13.x is expected" >&2; exit 1 ;;
esac
tree=.cache/cuda
[ "$series" = 13.0 ] || tree=.cache/cuda-$series

only=${1:-all}
if [ "$only" = tests ] && ls "$tree"/lib/libnvrtc.so.* "$tree"/lib/libcupti.so.* >/dev/null 2>&1; then
    exit 0
fi
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
# The runtime and crt for cuda.h and what it includes, which CUPTI's header wants.
packages="nvidia-cuda-nvrtc nvidia-cuda-cupti nvidia-cuda-runtime $crt"
[ "$only" = tests ] || packages="$packages nvidia-cuda-nvcc nvidia-cuda-cccl $extra"
for name in $packages; do
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$wheels" "$name$suffix==$series.*"
done
# The disassembler comes without the compiler's series: it reads older code too. It has no CUDA 12 wheel.
[ -n "$suffix" ] || [ "$only" = tests ] || for name in nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm; do
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$wheels" "$name==13.*"
done

rm -rf "$tree.new"
mkdir -p "$tree.new"
for wheel in "$wheels"/*.whl; do
    python3 -m zipfile -e "$wheel" "$tree.new"
done
# CUDA 13 wheels share nvidia/cu13; CUDA 12 wheels have a folder each.
rm -rf "$tree"
mkdir -p "$tree"
for part in "$tree.new"/nvidia/*/; do
    cp -a "$part". "$tree"
done
rm -rf "$tree.new"
chmod +x "$tree"/bin/* "$tree"/nvvm/bin/* 2>/dev/null || true
ls "$tree"/lib/libnvrtc.so.* >/dev/null
echo "$tree is ready" >&2
