#!/usr/bin/env bash
# Profiles and tunes random models of real shapes on an NVIDIA GPU, and measures what was promised with whole tokens.
#
#   scripts/gpu-tune.sh DIR                 # everything
#   scripts/gpu-tune.sh DIR ap3 lut4        # only these: ap3 lut4 phi3 70b grid clocks small
#
# Tables, logs and pictures go to DIR; the profiles themselves, which are large, to DIR/nsys. DECDEC is the program
# [default: cargo run]. What fails is printed, and the rest goes on.
set -uo pipefail
if [ $# -eq 0 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 1; fi
dir=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
decdec=${DECDEC:-cargo run --release --quiet --}
what=${*:-ap3 lut4 grid phi3 70b clocks small}
nsys=${NSYS_DIR:-$dir/nsys}
failed=0

# log, seconds at most, arguments: runs the program, all output to the screen and the log
step() {
    local log=$dir/$1.log most=$2 start=$SECONDS
    shift 2
    echo "\$ decdec $*" | tee "$log"
    timeout -k 5 "$most" $decdec "$@" 2>&1 | tee -a "$log"
    local status=${PIPESTATUS[0]}
    echo "($((SECONDS - start)) s)" | tee -a "$log"
    if [ "$status" -ne 0 ]; then echo "FAILED with $status (124: over $most s): $*" | tee -a "$log"; failed=1; fi
    return "$status"
}

# name, model, algorithm, bits, targets, tokens of a verified text, flags of profile …; at most four minutes
one() {
    local name=$1 model=$2 algo=$3 bits=$4 targets=$5 tokens=$6
    shift 6
    local of="--model-name $model --algo $algo --bitwidth $bits --nsys-dir $nsys"
    step "profile-$name" 90 profile "$name" $of --device cuda --overwrite "$@" &&
        step "tune-$name" 145 tune "$name" $of --device cuda --target-slowdown "$targets" --verify \
            --verify-tokens "$tokens" --csv-dir "$dir" --plots-dir "$dir" --tuned-dir "$dir"
}

# The last table of a log, each row behind the log's name: after verification it has the real slowdown.
table() {
    awk -v name="$(basename "$1" .log)" '
        /target %/ { count = 0; head = $0 }
        /^ *[0-9]+\.[0-9]+ .*, / { rows[++count] = $0 }
        END { if (head) printf "%-14s %s\n", "", head; for (i = 1; i <= count; i++) printf "%-14s %s\n", name, rows[i] }' "$1"
}

llama8=Meta-Llama-3-8B-Instruct
llama70=Meta-Llama-3-70B-Instruct
phi3=Phi-3-medium-4k-instruct
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv 2>&1 | tee "$dir/gpu.log"
$decdec devices 2>&1 | tee -a "$dir/gpu.log"

for part in $what; do
    case $part in
        ap3) one ap3 $llama8 sqllm 3 2.5,5,10,20 100 ;;
        lut4) one lut4 $llama8 awq 4 2.5,5,10,20 100 ;;
        phi3) one phi3 $phi3 sqllm 3 2.5,5,10,20 60 --tokens 5 ;;
        70b) one 70b $llama70 sqllm 3 2.5,5,10,20 24 --tokens 4 --halve-layers --min-n-tb 8 --max-n-tb 32 ;;
        grid)
            # Every mix of a few k_chunk, measured as it is: no choice within a target is worth more than what was found.
            of="--model-name $llama8 --algo sqllm --bitwidth 3 --nsys-dir $nsys"
            step profile-grid 240 profile grid $of --device cuda --overwrite --tokens 5 --min-n-tb 4 --max-n-tb 16 \
                --max-k-chunk 16 --mixes 0,4,8,16 &&
                step tune-grid 60 tune grid $of --device cuda --target-slowdown 2.5,5,10,20 --exhaustive --verify \
                    --csv-dir "$dir" --plots-dir "$dir" --tuned-dir "$dir"
            ;;
        clocks)
            # The same few configurations by both clocks: which comes closer to whole tokens?
            for clock in cupti events; do
                one "$clock" $llama8 sqllm 3 5,20 100 --measure products --clock $clock --min-n-tb 28 --max-n-tb 34 \
                    --max-k-chunk 12
            done
            # What was tuned before, measured again by itself.
            tuned=$(ls "$dir"/ap3_*_10.0.json 2>/dev/null | head -1)
            [ -z "$tuned" ] || step profile-tuned 60 profile again --model-name $llama8 --algo sqllm --bitwidth 3 \
                --nsys-dir "$nsys" --device cuda --overwrite --tuned "$tuned"
            ;;
        small)
            # Kernels without a fast form have several launches a product; other types and selections.
            step profile-bf16 60 profile bf16 --measure products --model-name $llama8 --algo sqllm --bitwidth 4 --fp-dtype bf16 --nsys-dir "$nsys" \
                --device cuda --overwrite --tokens 2 --min-n-tb 16 --max-n-tb 17 --max-k-chunk 2 --selection exact
            step profile-5bit 60 profile any --measure products --model-name $llama8 --algo sqllm --bitwidth 5 --nsys-dir "$nsys" \
                --device cuda --overwrite --tokens 1 --min-n-tb 16 --max-n-tb 16 --max-k-chunk 2 --halve-layers
            ;;
        *) echo "no part $part: ap3 lut4 phi3 70b grid clocks small" >&2; failed=1 ;;
    esac
done

echo
echo "======== summary ========"
for log in "$dir"/profile-*.log "$dir"/tune-*.log; do
    [ -e "$log" ] || continue
    echo "-- $(basename "$log" .log): $(grep '^(.* s)$' "$log" | tail -1)"
    grep -E '^(device memory|host link|R_bw|a token|configurations|tuned  )|in a graph:|until then|FAILED|^error' "$log" || true
    grep -E 'took .* %: too slow' "$log" || true
done
echo
echo "======== model and format; predicted (slowdown) and real slowdown ========"
for log in "$dir"/tune-*.log; do
    [ -e "$log" ] && table "$log"
done
exit $failed
