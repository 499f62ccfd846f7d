#!/usr/bin/env bash
# The CUDA tests and benchmarks, on a machine with an NVIDIA GPU: everything that benches/README.md quotes.
#
#   scripts/gpu.sh            # tests, then the tables
#   scripts/gpu.sh tests
#   scripts/gpu.sh tables
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-all}
if [ "$what" = all ] || [ "$what" = tests ]; then
    DECDEC_TEST_DEVICES=cuda cargo test --release --test cuda_kernels --test cuda_decode --test golden --test backend
fi
if [ "$what" = all ] || [ "$what" = tables ]; then
    cargo bench --bench gemv -- --bits 3,4
    cargo bench --bench gemv -- --bits 3 --format ap --k-chunk 0,1,4,8,16,32 --n-tb 8,16,32
    cargo bench --bench generate -- --ops 1000
    cargo bench --bench generate -- --k-chunk 0,8,0/0/8/8 --n-tb 16,32 --prompt 1,512
    for format in ap lutgemm; do
        for bits in 3 4; do
            cargo bench --bench generate -- --format "$format" --bits "$bits" --prompt 1
        done
    done
fi
