#!/usr/bin/env bash
# Counts lines of code, kernels included: without tests, comments and blank lines.
#
#   scripts/lines.sh [COMMIT]     HEAD if none is named
#
# Prints the commit and the sum of tokei's column "Code" over src, kernels-cuda and kernels-wgsl. Left out are
# folders named tests, files named tests.rs or fixture.rs, and modules `#[cfg(test)] mod NAME { … }` inside files.
# tokei counts a .cuh file only under the name of a .cu file. TOKEI names the program where it is not on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
tokei=${TOKEI:-tokei}
command -v "$tokei" > /dev/null || {
    echo "$tokei is not installed: cargo install tokei, or name it in TOKEI" >&2
    exit 1
}
commit=$(git rev-parse --short "${1:-HEAD}")
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
git archive "$commit" src kernels-cuda kernels-wgsl | tar -x -C "$tree"
cd "$tree"
find . -depth -type d -name tests -exec rm -r {} +
find . -type f \( -name tests.rs -o -name fixture.rs \) -delete
# rustfmt closes a module at the margin where it began.
find . -name '*.rs' -exec perl -0pi -e 's/^#\[cfg\((?:all\()?test\b.*\)\]\n(?:#\[.*\]\n)*(?:pub(?:\(crate\))? )?mod \w+ \{\n.*?^\}\n//gms' {} +
find . -name '*.cuh' -exec sh -c 'mv "$1" "${1%.cuh}.h.cu"' - {} \;
"$tokei" --output json src kernels-cuda kernels-wgsl |
    python3 -c 'import json, sys; print(sys.argv[1], json.load(sys.stdin)["Total"]["code"])' "$commit"
