#!/usr/bin/env bash
# Builds the wheel for Linux on x86-64 with glibc 2.28 or later, and tries it where there is no Rust.
#
#   scripts/wheel.sh              # target/wheels/decdec-VERSION-py3-none-manylinux_2_28_x86_64.whl
#   scripts/wheel.sh check WHEEL  # tries one that is there
#
# Needs cargo, a C compiler, Python 3.9 or later with pip. Zig, from PyPI, links against the old glibc.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() {
    local tools=.cache/maturin
    [ -x $tools/bin/maturin ] || { python3 -m venv $tools && $tools/bin/pip install -q 'maturin[zig]>=1.9,<2'; }
    export DECDEC_COMMIT=${DECDEC_COMMIT:-$(git rev-parse --short=9 HEAD 2>/dev/null || true)}
    local maturin=("$tools/bin/maturin" build --release --locked --zig --compatibility manylinux_2_28)
    maturin+=(--target x86_64-unknown-linux-gnu --out target/wheels)
    PATH=$PWD/$tools/bin:$PATH "${maturin[@]}"
    # The program knows its own man pages and completions; with them, where maturin looks for such files, the wheel is
    # packed again.
    local share=decdec.data/data/share decdec=target/x86_64-unknown-linux-gnu/release/decdec
    trap 'rm -rf "$work" decdec.data' EXIT
    mkdir -p "$share"/{man/man1,bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
    "$decdec" man "$share/man/man1"
    "$decdec" completions bash >"$share/bash-completion/completions/decdec"
    "$decdec" completions zsh >"$share/zsh/site-functions/_decdec"
    "$decdec" completions fish >"$share/fish/vendor_completions.d/decdec.fish"
    PATH=$PWD/$tools/bin:$PATH "${maturin[@]}"
    rm -rf decdec.data
}

# check WHEEL: installs it where nothing of this checkout is at hand, and asks it what it is and what it finds.
check() {
    local wheel=$1 venv=$work/venv symbols
    case $wheel in *-manylinux_2_28_x86_64.whl) ;; *) echo "error: $wheel is not for manylinux_2_28_x86_64" >&2; exit 1 ;; esac
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q "$wheel"
    local bare=(env -i "PATH=$venv/bin:/usr/bin:/bin" "HOME=$work")
    if "${bare[@]}" sh -c 'command -v cargo rustc'; then
        echo "error: there is a Rust on the path of the check" >&2
        exit 1
    fi
    (cd "$work" && "${bare[@]}" decdec --version && "${bare[@]}" decdec doctor)
    [ -f "$venv/share/man/man1/decdec.1" ] || { echo "error: the wheel has no man page" >&2; exit 1; }
    # No symbol of a later glibc than the wheel's name says.
    symbols=$(python3 - "$venv/bin/decdec" <<'PYTHON'
import re, sys
found = re.findall(rb"GLIBC_2\.(\d+)", open(sys.argv[1], "rb").read())
print(max(map(int, found)))
PYTHON
    )
    [ "$symbols" -le 28 ] || { echo "error: the program needs glibc 2.$symbols, 2.28 is promised" >&2; exit 1; }
    echo "$wheel runs without Rust, from glibc 2.$symbols on"
}

if [ "${1:-}" = check ]; then
    check "$2"
else
    rm -f target/wheels/decdec-*.whl
    build
    check target/wheels/decdec-*-manylinux_2_28_x86_64.whl
fi
