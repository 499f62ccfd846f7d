#!/usr/bin/env bash
# Other people's programs, which tests run: .cache/clients (openai, anthropic, playwright; huggingface_hub, which shares a
# cache with us), .cache/vllm-router, .cache/smg. Each router has a folder of its own, since both bring what the other replaces.
set -euo pipefail
cd "$(dirname "$0")/.."

# folder NAME PACKAGE...: a Python environment with these packages.
folder() {
    [ "$(cat ".cache/$1/done" 2>/dev/null)" != "${*:2}" ] || return 0
    python3 -m venv ".cache/$1" && ".cache/$1/bin/python" -m pip install -q "${@:2}" && echo "${*:2}" >".cache/$1/done"
}

mkdir -p .cache
folder clients openai anthropic playwright huggingface_hub
folder vllm-router vllm-router==0.1.17
folder smg smg==1.13.0
