#!/usr/bin/env bash
# What guessing tokens brings on real text: scripts/speculation.sh MODEL [GUESSES] [DEVICE]
#
# Twenty summaries and edits (tests/data/documents), greedy, with and without guesses, which must not change a token.
# Answers that go round in a loop are left out: guesses there are right for no good reason. Prints tokens a pass; what a
# pass of so many rows costs on a device is measured by `cargo bench --bench rows`, and the product of both is computed.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?usage: scripts/speculation.sh MODEL [GUESSES] [DEVICE]}
guesses=${2:-7}
device=${3:-auto}
decdec=${CARGO_TARGET_DIR:-target}/release/decdec
[ -x "$decdec" ] || cargo build --quiet --release

python3 - "$decdec" "$model" "$guesses" "$device" tests/data/documents/documents.txt <<'PYTHON'
import json
import subprocess
import sys

decdec, model, guesses, device, documents = sys.argv[1:]


def answer(prompt, speculate):
    command = [decdec, "generate", "--checkpoint-path", model, "--device", device, "--chat", "--json", "--prompt", prompt,
               "--max-new-tokens", "200", "--speculate", speculate]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loops(tokens):
    """Whether the end of an answer is the same few tokens, three times and more."""
    return any(len(tokens) >= 3 * n and tokens[-n:] == tokens[-2 * n:-n] == tokens[-3 * n:-2 * n] for n in range(1, 33))


made = passes = left_out = 0
seconds = [0.0, 0.0]
print("document,tokens,passes,tokens_a_pass,guessed,right,speedup")
for i, document in enumerate(open(documents).read().strip().split("\n\n")):
    plain, guessed = (answer(document, speculate) for speculate in ["off", guesses])
    if plain["tokens"] != guessed["tokens"]:
        sys.exit(f"document {i}: guesses have changed the text")
    if loops(plain["tokens"]):
        left_out += 1
        continue
    decoded = round(guessed["tokens_per_pass"] * guessed["passes"])
    made, passes = made + decoded, passes + guessed["passes"]
    times = [plain["decode_seconds"], guessed["decode_seconds"]]
    seconds = [a + b for a, b in zip(seconds, times)]
    print(f"{i},{decoded},{guessed['passes']},{guessed['tokens_per_pass']:.2f},{guessed['guessed']},"
          f"{guessed['guessed_right']},{times[0] / max(times[1], 1e-9):.2f}")
print(f"# {left_out} answers go round in a loop and are left out")
if passes == 0:
    sys.exit("no answer is left")
print(f"# {made / passes:.2f} tokens a pass, {seconds[0] / seconds[1]:.2f} times as fast here")
PYTHON
