#!/usr/bin/env bash
# The recall model, which is part of this repository, looks values up in ledgers, on two ranks of this machine: 200
# questions, 32 steps of adapting, the same 200 questions. A table, and a page with the curves.
#
# Usage: demo.sh BIN_FOLDER OUT_FOLDER, with the Python package where $REFOCUS_PYTHON (python3) finds it; everything it
# starts ends with it. REFOCUS_DEMO_{METHOD,LENGTHS,QUESTIONS} take the place of what stands below.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:?usage: demo.sh BIN_FOLDER OUT_FOLDER}" && pwd)
out=${2:?usage: demo.sh BIN_FOLDER OUT_FOLDER}

method=${REFOCUS_DEMO_METHOD:-qttt:rows=recall,lr=4e-3}   # see docs/evaluation.md; the rate suits this model
lengths=${REFOCUS_DEMO_LENGTHS:-512,1536,3072,6144,12288} # tokens
questions=${REFOCUS_DEMO_QUESTIONS:-200}                  # of each ledger
ranks=2
start_seconds=120
export REFOCUS_PYTHON=${REFOCUS_PYTHON:-python3}

work=$(mktemp -d)
server=
finish() {
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" || true
  fi
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

headline() { printf '\n== %s\n' "$*"; }
give_up() {
  echo "demo: $*; the end of its output:" >&2
  tail -q -n 20 "$work/serve.out" "$work/serve.err" >&2
  exit 1
}

"$bin/refocus" eval list >/dev/null  # says in a line where the Python package is missing

headline "Starting a coordinator and $ranks workers: the recall model, 2.8 million parameters, on the CPU"
ln -s "$root/bench/recall_model/model" "$work/recall-model"  # the name that the service gives it
"$bin/refocus" serve --model "$work/recall-model" --ranks $ranks --listen 127.0.0.1:0 --log-level warning \
    >"$work/serve.out" 2>"$work/serve.err" &
server=$!
deadline=$((SECONDS + start_seconds))
until grep -qs '^Ready' "$work/serve.out"; do  # which the server's shell is about to make
  kill -0 "$server" 2>/dev/null || give_up "the server did not start"
  [ $SECONDS -lt $deadline ] || give_up "the server was not ready within $start_seconds s"
  sleep 0.1
done
grep '^Ready' "$work/serve.out"
REFOCUS_ADDRESS=$(sed -n 's/^Ready: \([^,]*\),.*/\1/p' "$work/serve.out")
export REFOCUS_ADDRESS

headline "Ledgers of $lengths tokens: $questions questions each, adapting, the same questions"
mkdir -p "$out"
rm -f "$out"/{journal.jsonl,summary.jsonl,results.csv,report.html}
"$bin/refocus" eval run --tasks symbols --lengths "$lengths" --questions "$questions" --methods "in-context,$method" \
    --measure 0 --out "$out" >/dev/null

headline "Summary"
"$REFOCUS_PYTHON" "$root/deploy/demo_summary.py" "$out"
