#!/usr/bin/env python3
"""The closing table of the demo on a novel and its verdict, from what `refocus --json-file` and `status --json` wrote.

Usage: demo_novel_summary.py FOLDER
"""
import json
import pathlib
import sys

NOTICEABLE = 0.02  # nats per token; less may as well be chance on a thousand tokens


def events(path):
    """64-bit integers are strings in protobuf's JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(label, tokens, seconds, rate):
    speed = "-" if rate <= 0 else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
    return (label, f"{tokens:,}", f"{seconds:.2f}", speed)


def phase(label, event):
    usage = event["usage"]
    return row(label, int(usage["tokens"]), usage["seconds"], usage["tokens_per_second"])


def answer(label, event):
    """The first token's time holds the reading of the question, so the rate is that of the tokens after it."""
    summary = event["summary"]
    tokens = int(summary["generated_tokens"])
    return row(label, tokens, summary["prompt_seconds"] + summary["decode_seconds"],
               summary["tokens_per_second"] if tokens > 1 else 0)


def score(label, event):
    tokens, seconds = int(event["token_count"]), event["seconds"]
    return row(label, tokens, seconds, tokens / seconds if seconds > 0 else 0)


def verdict(base, adapted):
    change = f"{adapted - base:+.4f} nats per token on pages that it had not read"
    if base - adapted > NOTICEABLE:
        return f"Adapting helped this model on this text: {change}."
    if base - adapted > -NOTICEABLE:
        return f"Adapting made little difference to this model on this text: {change}."
    return f"Adapting did not help this model on this text: {change}."


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    work = pathlib.Path(sys.argv[1])
    names = ("prefill", "adapt", "score_base", "score_adapted", "answer_base", "answer_adapted")
    last = {name: events(work / name)[-1] for name in names}
    rows = [("phase", "tokens", "seconds", "tokens/s")]
    rows += [phase(name, last[name]) for name in ("prefill", "adapt")]
    rows += [score(f"score, {name}", last[f"score_{name}"]) for name in ("base", "adapted")]
    rows += [answer(f"answer, {name}", last[f"answer_{name}"]) for name in ("base", "adapted")]
    for cells in rows:
        print(f"{cells[0]:<16}" + "".join(f"{cell:>12}" for cell in cells[1:]))
    ranks = events(work / "status")[0]["ranks"]
    print("memory per rank " + ", ".join(f"{int(rank['resident_bytes']) / 2**20:,.0f} MiB" for rank in ranks))
    base, adapted = (-last[name]["sum_logprob"] / max(int(last[name]["token_count"]), 1)
                     for name in ("score_base", "score_adapted"))
    print(f"\nunseen pages: {base:.4f} nats per token before adapting, {adapted:.4f} after")
    print(verdict(base, adapted))


if __name__ == "__main__":
    main()
