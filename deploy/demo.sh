#!/usr/bin/env bash
# A language model of 135 million parameters reads the first pages of a novel on two ranks, adapts its queries to them, and
# answers. Usage: demo.sh BIN_FOLDER [NOVEL]; everything it starts ends with it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:?usage: demo.sh BIN_FOLDER [NOVEL]}" && pwd)
novel=${2:-pride_and_prejudice}
model=$root/.deps/data/SmolLM2-135M-Instruct.Q4_1.gguf
text=$root/.deps/data/novels/$novel.txt

ranks=2
context_bytes=${REFOCUS_DEMO_BYTES:-15500}   # about 4,000 tokens
unseen_bytes=$((context_bytes / 4))          # about 1,000 tokens, the pages that follow
steps=32
span_tokens=128
learning_rate=3e-4                           # millions of parameters; billions want about 1e-5
question="What is the name of the house that Mr. Bingley has rented?"

for file in "$model" "$text"; do
  [ -f "$file" ] || { echo "demo: $file is not there: run ./setup" >&2; exit 1; }
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

headline "Starting a coordinator and $ranks workers: SmolLM2-135M-Instruct on the CPU"
# Not through the function: $! would be a subshell that dies without its server.
"$bin/refocus" serve --model "$model" --ranks $ranks --listen 127.0.0.1:0 --log-level warning >"$work/serve.out" 2>"$work/serve.err" &
server=$!
while ! grep -q '^Ready' "$work/serve.out"; do
  kill -0 "$server" 2>/dev/null || { cat "$work/serve.out" "$work/serve.err" >&2; echo "demo: the server did not start" >&2; exit 1; }
  sleep 0.1
done
grep '^Ready' "$work/serve.out"
REFOCUS_ADDRESS=$(sed -n 's/^Ready: \([^,]*\),.*/\1/p' "$work/serve.out")
export REFOCUS_ADDRESS

headline "Opening the first $context_bytes bytes of ${novel//_/ }"
refocus context create "$text" --id novel --chat --max-bytes "$context_bytes" | tee "$work/prefill"

headline "The pages that follow, unseen, with the model's own queries"
refocus score novel --base --target-file "$text" --skip-bytes "$context_bytes" --max-bytes $unseen_bytes --parts 4 | tee "$work/base"

headline "Adapting the queries: $steps steps on spans of $span_tokens tokens"
refocus adapt novel --steps $steps --span-tokens $span_tokens --learning-rate $learning_rate --seed 1 | tee "$work/adapt"

headline "The same unseen pages with the adapted queries"
refocus score novel --target-file "$text" --skip-bytes "$context_bytes" --max-bytes $unseen_bytes --parts 4 | tee "$work/adapted"

headline "Question: $question"
for queries in --base "--adapter default"; do
  if [ "$queries" = --base ]; then echo "-- base queries"; else echo "-- adapted queries"; fi
  # shellcheck disable=SC2086  # an option and its value
  refocus ask novel "$question" $queries --max-tokens 60 2> >(tee "$work/ask${queries%% *}" >&2)
done

headline "Summary"
refocus status --json >"$work/status"
python3 - "$work" <<'PYTHON'
import json, pathlib, re, sys
work = pathlib.Path(sys.argv[1])
read = lambda name: (work / name).read_text()
rows = [("phase", "tokens", "seconds", "tokens/s")]
for name in ("prefill", "adapt"):
    cells = re.search(rf"^{name} +([\d,]+) +([\d.]+) +([\d.,]+)", read(name), re.M).groups()
    rows.append((name, *cells))
loss = {}
for name, label in (("base", "score, base"), ("adapted", "score, adapted")):
    tokens, nats, _, _, _, seconds = re.search(r"^1 +" + r" +".join([r"([-\d.,]+)"] * 4) + r" +(\w+) +([\d.]+)", read(name), re.M).groups()
    loss[name] = float(nats)
    rows.append((label, tokens, seconds, f"{int(tokens.replace(',', '')) / float(seconds):,.0f}"))
for name, label in (("ask--base", "answer, base"), ("ask--adapter", "answer, adapted")):
    tokens, rate = re.search(r"\[(\d+) tokens.*then ([\d.,]+) tokens/s", read(name)).groups()
    seconds = (int(tokens) - 1) / float(rate.replace(",", ""))
    rows.append((label, tokens, f"{seconds:.2f}", rate))
for row in rows:
    print(f"{row[0]:<16}" + "".join(f"{cell:>12}" for cell in row[1:]))
cluster = json.loads(read("status").splitlines()[0])
print("memory per rank " + ", ".join(f"{int(rank['resident_bytes']) / 2**20:,.0f} MiB" for rank in cluster["ranks"]))
gain = loss["base"] - loss["adapted"]
print(f"\nunseen pages: {loss['base']:.4f} nats per token before adapting, {loss['adapted']:.4f} after")
change = f"{-gain:+.4f} nats per token on pages that it had not read"
if gain > 0.02:
    print(f"Adapting helped this model on this text: {change}.")
elif gain > -0.02:
    print(f"Adapting made little difference to this model on this text: {change}.")
else:
    print(f"Adapting did not help this model on this text: {change}.")
PYTHON
