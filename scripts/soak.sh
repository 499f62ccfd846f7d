#!/bin/bash
# The server under load and faults, other people's clients and routers: soak.sh MODEL LOGS [SECONDS [REQUESTS]].
#
# Needs target/release/decdec, and a Python in DECDEC_PYTHON (default python3) with openai, anthropic, lm_eval[api] and
# playwright; chromium for the page; vllm-router and smg, where scripts/clients.sh puts them, if DECDEC_ROUTERS names that
# folder. What is missing is said and left out. Ends with 1 if anything failed.
set -uo pipefail
model=${1:?a model} logs=${2:?a folder for logs} seconds=${3:-600} requests=${4:-${3:-600}}
here=$(cd "$(dirname "$0")" && pwd) program=$here/../target/release/decdec
python=${DECDEC_PYTHON:-python3} failed=0
mkdir -p "$logs"

# start NAME PORT FLAGS...: a server; its id is in $server.
start() {
  "$program" serve --checkpoint-path "$model" --port "$2" --served-model-name m --max-seq-len 2048 "${@:3}" >"$logs/$1.log" 2>&1 &
  server=$!
  for _ in $(seq 600); do
    curl -fs "http://127.0.0.1:$2/ready" >/dev/null && return
    kill -0 $server 2>/dev/null || break
    sleep 0.2
  done
  echo "$1 does not start, see $logs/$1.log" >&2
  exit 1
}

# run NAME COMMAND...: a part of this, its log in NAME.log.
run() {
  if "${@:2}" >"$logs/$1.log" 2>&1; then
    echo "ok      $1: $(tail -n 1 "$logs/$1.log" | cut -c1-400)"
  else
    echo "FAILED  $1, see $logs/$1.log" && failed=1
  fi
}

has() { "$python" -c "import $1" 2>/dev/null || { echo "skipped $2: no $1 in $python"; return 1; }; }

start server 8101 --slots 8 --drain-notice 0
trap 'kill $(jobs -p) 2>/dev/null' EXIT
url=http://127.0.0.1:8101
has openai clients && has anthropic clients && run clients "$python" "$here/serve/clients.py" $url
has lm_eval evaluation && run evaluation "$python" "$here/serve/evaluation.py" $url "$program" "$model" "$logs/evaluation"
has playwright page && run page "$python" "$here/serve/page.py" $url "$logs/page.png"
run load "$python" "$here/serve/load.py" $url $server "$seconds" 16 "$requests"
run fuzz "$python" "$here/serve/fuzz.py" $url "$seconds"
run faults "$python" "$here/serve/faults.py" $url
kill -TERM $server && wait $server || { echo "FAILED  the server does not end well" && failed=1; }
if [ -n "${DECDEC_ROUTERS:-}" ]; then
  for router in vllm-router smg; do
    run "$router" "$python" "$here/serve/routers.py" "$DECDEC_ROUTERS/$router/bin/$router" "$program" "$model" "$logs/$router"
  done
else
  echo "skipped routers: DECDEC_ROUTERS names none"
fi
exit $failed
