#!/usr/bin/env bash
# Counts what scripts/test.sh ran: scripts/tally.sh DIR. The last line is "N passed, N failed, N skipped".
#
# DIR holds NAME.log and NAME.status (0 or not) of every step, and NAME.skips if tests said that they do not run:
# PROGRAM TEST: REASON. A step that runs no tests counts as one. libtest lets a skipped test pass: it is taken from
# those. With CI=true a skip fails that no line of scripts/allowed-skips names.
set -euo pipefail
dir=$(realpath "$1")
cd "$(dirname "$0")/.."
passed=0 failed=0 skipped=0
all=$(mktemp)
trap 'rm -f "$all"' EXIT

for status in "$dir"/*.status; do
    name=$(basename "$status" .status)
    # What cargo and libtest say: tests passed, failed, programs without a result; then the ignored, as skips.
    awk '
        /^ *Running .*\(.*\)$/ { started++; program = $NF; sub(/.*\//, "", program); sub(/-[0-9a-f]*\)$/, "", program) }
        /^ *Doc-tests / { started++; program = "doctests" }
        /^test .* \.\.\. ignored/ { test = $2; sub(/.*ignored(, )?/, ""); print program, test ": " ($0 ? $0 : "ignored") }
        /^test result: / { ended++; passed += $4; failed += $6 }
        END { print "#", started + 0, passed + 0, failed + 0, started - ended }' "$dir/$name.log" >"$all.step"
    read -r _ programs step_passed step_failed died < <(grep '^# ' "$all.step")
    ignored=$(grep -vc '^# ' "$all.step" || true)
    said=$(sed 's/: .*//' "$dir/$name.skips" 2>/dev/null | sort -u | grep -c . || true)
    step_failed=$((step_failed + died))
    if [ "$programs" = 0 ]; then
        step_passed=1
    fi
    if [ "$(cat "$status")" != 0 ] && [ "$step_failed" = 0 ]; then
        step_failed=1
        [ "$programs" -gt 0 ] || step_passed=0
    fi
    [ "$step_failed" = 0 ] || echo "failed: $name, $step_failed"
    passed=$((passed + step_passed - said))
    failed=$((failed + step_failed))
    skipped=$((skipped + said + ignored))
    cat "$dir/$name.skips" 2>/dev/null >>"$all" || true
    grep -v '^# ' "$all.step" >>"$all" || true
    rm -f "$all.step"
done

# Reasons, each with how many tests gave it.
sed 's/^[^:]* [^ ]*: //' "$all" | sort | uniq -c | sort -rn | sed 's/^ */skipped: /'
if [ "${CI:-}" = true ]; then
    mapfile -t allowed < <(sed 's/  *# .*//; /^#/d; /^$/d' scripts/allowed-skips)
    while read -r skip; do
        for pattern in "${allowed[@]}"; do
            # shellcheck disable=SC2053
            [[ $skip == $pattern ]] && continue 2
        done
        echo "failed: $skip, which scripts/allowed-skips does not name"
        failed=$((failed + 1))
        skipped=$((skipped - 1))
    done < <(sort -u "$all")
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
