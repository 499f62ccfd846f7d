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

# Made again when the program has changed since.
if [ ! -e "$checkpoint/config.json" ] || [ "$decdec" -nt "$checkpoint/config.json" ]; then
    "$decdec" quantize "$model" --backend ap --bitwidth 3 --device cpu --out "$checkpoint" --overwrite
fi

python3 - "$decdec" "$model" "$checkpoint" <<'PYTHON'
import json, subprocess, sys

decdec, model, checkpoint = sys.argv[1:]

def run(*words):
    return subprocess.run([decdec, *words], capture_output=True, text=True, check=True).stdout

lines = run("eval", "compare", checkpoint, "--source", model, "--text", "tests/data/botchan.txt", "--windows", "100..106",
            "--k-chunks", "0", "8", "--device", "cpu", "--selection", "exact", "--json").splitlines()
measured = [json.loads(line) for line in lines]
speed = json.loads(run("generate", "--checkpoint-path", model, "--device", "cpu", "--num-samples", "1", "--max-new-tokens",
                       "64", "--ignore-eos", "--json"))["decode_tokens_per_second"]
figure = lambda m, name: m["texts"][0]["figures"][name]["value"]
print(f"\n{'SmolLM2-135M':<22} {'perplexity':>10} {'KL':>7} {'same top token':>15} {'tokens/s':>9}")
print(f"{'full precision':<22} {figure(measured[0], 'Mean PPL(base)'):>10.1f} {0:>7.3f} {'100 %':>15} {speed:>9.1f}")
rows = [("full precision", model, [])]
for name, m, k in [("3-bit", measured[0], "0"), ("3-bit + DEC, k 8", measured[1], "8")]:
    same = f"{figure(m, 'Same top p %'):.0f} %"
    print(f"{name:<22} {figure(m, 'Mean PPL(Q)'):>10.1f} {figure(m, 'Mean KLD'):>7.3f} {same:>15} {m['tokens_per_second']:>9.1f}")
    rows.append((name, checkpoint, ["--n-tbs", "8", "--k-chunks", k, k, k, k, "--selection", "exact"]))
for question in json.load(open("tests/data/questions.json"))[:3]:
    print(f"\n{question['question']}")
    for name, path, flags in rows:
        answer = run("generate", "--checkpoint-path", path, "--device", "cpu", "--chat", "--prompt", question["question"],
                     "--max-new-tokens", "32", *flags)
        print(f"    {name:<18} {' '.join(answer.split())}")
print(f"\nNow talk to it: {decdec} chat --checkpoint-path {checkpoint}")
PYTHON
