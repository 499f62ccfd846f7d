#!/usr/bin/env bash
# Quantizes a real model to 3 bits on this machine and shows what compensation gives back.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/packages.sh cc pip
model=$(scripts/model.sh)
# As scripts/test.sh builds it; wherever cargo puts it.
decdec=$(cargo build --release --features reference-wgpu --bin decdec --quiet --message-format json-render-diagnostics |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
checkpoint=.cache/smollm2-ap3
text=tests/data/botchan.txt
question="What is the capital of France?"

# Made again when the program has changed since.
if [ ! -e "$checkpoint/config.json" ] || [ "$decdec" -nt "$checkpoint/config.json" ]; then
    "$decdec" quantize "$model" --backend ap --bitwidth 3 --out "$checkpoint" --overwrite
fi

# name, path, flags
row() {
    local name=$1 path=$2
    shift 2
    local answer perplexity speed
    answer=$("$decdec" generate --checkpoint-path "$path" --chat --prompt "$question" --max-new-tokens 32 "$@" 2>/dev/null)
    speed=$("$decdec" generate --checkpoint-path "$path" --num-samples 1 --max-new-tokens 64 --ignore-eos --json "$@" \
        2>/dev/null | sed 's/.*"decode_tokens_per_second":\([0-9]*\.[0-9]\).*/\1/')
    perplexity=$("$decdec" eval perplexity "$path" --text "$text" --windows 100..112 --json "$@" 2>/dev/null \
        | sed 's/.*"perplexity":\([0-9]*\.[0-9]\).*/\1/')
    printf '%-20s %10s %9s   %s\n' "$name" "$perplexity" "$speed" "$answer"
}

printf '\n%s\n\n%-20s %10s %9s   %s\n' "$question" "SmolLM2-135M" perplexity tokens/s answer
row "full precision" "$model" --device cpu
row "3-bit" "$checkpoint" --device cpu --k-chunks 0 0 0 0
for k in 8 32; do
    row "3-bit + DEC, k $k" "$checkpoint" --device cpu --n-tbs 8 --k-chunks $k $k $k $k --selection exact
done
