#!/usr/bin/env bash
# Runs every example, scripts/examples.sh [DIR]: on the model in DIR, or on a tiny one that knows nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=${1:-}
if [ -z "$model" ]; then
    model=$work/model
    mkdir "$model"
    data=tests/data
    cp $data/models/llama-3-yarn/model.safetensors "$model"
    sed 's/"max_position_embeddings": 96/"max_position_embeddings": 2048/' $data/models/llama-3-yarn/config.json >"$model/config.json"
    cp $data/tokenizers/llama-3.json "$model/tokenizer.json"
    cp $data/chat/llama-3.jinja "$model/chat_template.jinja"
    echo '{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}' >"$model/tokenizer_config.json"
fi

# As scripts/test.sh builds them.
cargo build --quiet --release --features reference-wgpu --examples

# example NAME ARGUMENTS...
example() {
    local name=$1
    shift
    "${CARGO_TARGET_DIR:-target}/release/examples/$name" "$model" "$@"
}

# says NAME WANTED: the example's output, on stdin, has a line that matches.
says() {
    tee "$work/said"
    grep -qE "$2" "$work/said" || { echo "$1 does not say $2" >&2; exit 1; }
}

printf 'hello\nand now?\n' | example chat | says chat .
printf 'one\ntwo\n%05000d\n' 0 | example batch | says batch '^1: ".*tokens/s'
grep -qE '^2: .*context has room for' "$work/said" || { echo "batch takes a prompt that is too long" >&2; exit 1; }
example perplexity LICENSE 64 2>/dev/null | says perplexity '^perplexity [0-9.]+ over [0-9]+ tokens'
example sampler "once upon" | says sampler .
