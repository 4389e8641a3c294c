#!/usr/bin/env bash
# A language model of 135 million parameters reads the first pages of a novel on two ranks, adapts its queries to them,
# and answers. Usage: demo_novel.sh BIN_FOLDER [NOVEL]; everything it starts ends with it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:?usage: demo_novel.sh BIN_FOLDER [NOVEL]}" && pwd)
novel=${2:-pride_and_prejudice}
model=$root/.deps/data/SmolLM2-135M-Instruct.Q4_1.gguf
text=$root/.deps/data/novels/$novel.txt

ranks=2
context_bytes=${REFOCUS_DEMO_BYTES:-15500}   # about 4,000 tokens
unseen_bytes=$((context_bytes / 4))          # about 1,000 tokens, the pages that follow
steps=${REFOCUS_DEMO_STEPS:-32}
span_tokens=128
learning_rate=1e-4                           # for 135 million parameters; billions want about 1e-5
start_seconds=120
question="What is the name of the house that Mr. Bingley has rented?"

for file in "$model" "$text"; do
  [ -f "$file" ] || { echo "demo-novel: $file is not there: run ./setup" >&2; exit 1; }
done

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

refocus() { "$bin/refocus" "$@"; }
headline() { printf '\n== %s\n' "$*"; }
give_up() {
  echo "demo-novel: $*; the end of its output:" >&2
  tail -q -n 20 "$work/serve.out" "$work/serve.err" >&2
  exit 1
}

headline "Starting a coordinator and $ranks workers: SmolLM2-135M-Instruct on the CPU"
# Not through the function: $! would be a subshell that dies without its server.
"$bin/refocus" serve --model "$model" --chat-template chatml --ranks $ranks --listen 127.0.0.1:0 --log-level warning \
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

headline "Opening the first $context_bytes bytes of ${novel//_/ }"
refocus context create "$text" --id novel --chat --max-bytes "$context_bytes" --json-file "$work/prefill"

unseen=(--target-file "$text" --skip-bytes "$context_bytes" --max-bytes $unseen_bytes --parts 4)
headline "The pages that follow, unseen, with the model's own queries"
refocus score novel --base "${unseen[@]}" --json-file "$work/score_base"

headline "Adapting the queries: $steps steps on spans of $span_tokens tokens"
refocus adapt novel --steps "$steps" --span-tokens $span_tokens --learning-rate $learning_rate --seed 1 \
    --json-file "$work/adapt"

headline "The same unseen pages with the adapted queries"
refocus score novel "${unseen[@]}" --json-file "$work/score_adapted"

headline "Question: $question"
echo "-- base queries"
refocus ask novel "$question" --base --max-tokens 60 --json-file "$work/answer_base"
echo "-- adapted queries"
refocus ask novel "$question" --adapter default --max-tokens 60 --json-file "$work/answer_adapted"

headline "Summary"
refocus status --json >"$work/status"
python3 "$root/deploy/demo_novel_summary.py" "$work"
