#!/usr/bin/env bash
# Five quantizations of SmolLM2, each with a seed of its own, asked the sixteen questions of tests/data/questions.json.
# Passes if compensated answers are right to ten questions in the median, and four of five name the capital of France.
# Takes an hour on two cores.
#     scripts/questions.sh [SEEDS] [K_CHUNKS]       as in: scripts/questions.sh "0 1 2 3 4" "8 8 8 8"
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${1:-0 1 2 3 4}
k_chunks=${2:-8 8 8 8}
model=$(scripts/model.sh)
decdec=${DECDEC:-$(cargo build --release --features reference-wgpu --bin decdec --quiet \
    --message-format json-render-diagnostics | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')}
for seed in $seeds; do
    out=.cache/questions-$seed
    # Made again when the program has changed since.
    if [ ! -e "$out/config.json" ] || [ "$decdec" -nt "$out/config.json" ]; then
        "$decdec" quantize "$model" --backend ap --bitwidth 3 --seed "$seed" --out "$out" --overwrite
    fi
done
python3 - "$decdec" "$model" "$seeds" "$k_chunks" <<'PYTHON'
import json, statistics, subprocess, sys

decdec, model, seeds, k_chunks = sys.argv[1], sys.argv[2], sys.argv[3].split(), sys.argv[4].split()
questions = json.load(open("tests/data/questions.json"))

def asked(name, path, flags):
    """How many questions are answered, and whether the first is."""
    right = []
    for question in questions:
        command = [decdec, "generate", "--checkpoint-path", path, "--chat", "--prompt", question["question"],
                   "--max-new-tokens", "32", "--device", "cpu", *flags]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        right.append(any(word in answer for word in question["answers"]))
    print(f"{name:<24} {sum(right):>2} of {len(right)}   {'knows' if right[0] else 'does not know'} the capital of France", flush=True)
    return sum(right), right[0]

asked("full precision", model, [])
plain = ["--k-chunks", "0", "0", "0", "0"]
compensated = ["--n-tbs", "8", "--k-chunks", *k_chunks, "--selection", "exact"]
results = []
for seed in seeds:
    path = f".cache/questions-{seed}"
    asked(f"seed {seed}, 3 bits", path, plain)
    results.append(asked(f"seed {seed}, compensated", path, compensated))
median, france = statistics.median(n for n, _ in results), sum(first for _, first in results)
print(f"compensated: median {median} of {len(questions)}, {france} of {len(seeds)} know the capital of France")
sys.exit(0 if median >= 10 and france * 5 >= 4 * len(seeds) else "error: 10 in the median and four of five are expected")
PYTHON
