#!/usr/bin/env bash
# Other people's clients and routers, which the tests of the server run: .cache/clients (openai, anthropic, playwright),
# .cache/vllm-router, .cache/smg. Each router has a folder of its own, since both bring what the other replaces.
set -euo pipefail
cd "$(dirname "$0")/.."

# folder NAME PACKAGE...: a Python environment with these packages.
folder() {
    [ -f ".cache/$1/done" ] && return
    python3 -m venv ".cache/$1" && ".cache/$1/bin/python" -m pip install -q "${@:2}" && touch ".cache/$1/done"
}

mkdir -p .cache
folder clients openai anthropic playwright
folder vllm-router vllm-router==0.1.17
folder smg smg==1.13.0
