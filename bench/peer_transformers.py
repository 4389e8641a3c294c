#!/usr/bin/env python3
"""What transformers does on the CPU: prefill, decoding, and query-only training as its users write it.

    python3 bench/peer_transformers.py --threads 2 --tokens 4096

Loads the GGUF model in fp32 and the first --tokens tokens of a novel, prints one JSON line per figure. Peak memory is
that of the process during the phase (VmHWM, reset before each). The adaptation: 32 steps, one span of 128 rows per
step, uniform over the context; the prefix of the frozen cache is sliced into a DynamicCache, the span runs forward,
the loss goes backward to the q_proj weights alone, AdamW with decay 0.01 and clip 1.0. Needs torch, transformers and
gguf.
"""
import argparse
import json
import os
import pathlib
import random
import struct
import sys
import time
import zlib

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

DATA = pathlib.Path(__file__).resolve().parents[1] / ".deps" / "data"
PREFILL_CHUNKS = (512, 1024, 0)  # 0: whole
DECODE_TOKENS = 32


def emit(**fields):
    print(json.dumps(fields), flush=True)


def first_novel(path):
    """Text of the first entry of an R lazy-load database: a length and a zlib stream with a vector of lines."""
    data = path.read_bytes()
    raw = zlib.decompressobj().decompress(data[4:])
    word = lambda at: struct.unpack_from(">i", raw, at)[0]
    at = 14 + 4 + word(14)                      # format mark, versions, name of the encoding
    count, at, lines = word(at + 4), at + 8, []
    for _ in range(count):
        size = max(word(at + 4), 0)             # flags, then bytes; -1: missing
        lines.append(raw[at + 8:at + 8 + size].decode())
        at += 8 + size
    return "\n".join(lines)


class PeakMemory:
    """Peak resident bytes of this process since the object was made."""

    def __init__(self):
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def mib(self):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 1024)
        raise RuntimeError("/proc/self/status has no VmHWM")


def prefill(model, ids, chunk):
    cache = DynamicCache()
    step = chunk or ids.shape[1]
    with torch.no_grad():
        for begin in range(0, ids.shape[1], step):
            out = model(input_ids=ids[:, begin:begin + step], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, out.logits[:, -1]


def measure_prefill(model, ids, common):
    results = []
    for chunk in PREFILL_CHUNKS:
        memory, started = PeakMemory(), time.perf_counter()
        prefill(model, ids, chunk)
        seconds = time.perf_counter() - started
        results.append((seconds, chunk, memory.mib()))
        emit(figure="prefill_chunk", chunk=chunk or ids.shape[1], seconds=round(seconds, 3), peak_rss_mib=memory.mib(),
             **common)
    seconds, chunk, peak = min(results)
    emit(figure="prefill", seconds=round(seconds, 3), tokens_per_s=round(ids.shape[1] / seconds, 1),
         chunk=chunk or ids.shape[1], peak_rss_mib=peak, **common)


def measure_decode(model, ids, common):
    cache, logits = prefill(model, ids, 1024)
    memory, times = PeakMemory(), []
    with torch.no_grad():
        for _ in range(DECODE_TOKENS):
            started = time.perf_counter()
            token = logits.argmax(-1, keepdim=True)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            times.append(1e3 * (time.perf_counter() - started))
    emit(figure="decode", ms_per_token=round(sorted(times)[len(times) // 2], 2), best_ms=round(min(times), 2),
         samples=len(times), peak_rss_mib=memory.mib(), **common)


def measure_adapt(model, ids, args, common):
    rng = random.Random(args.seed)
    starts = [rng.randrange(ids.shape[1] - args.rows) for _ in range(args.steps)]
    cache, _ = prefill(model, ids, 1024)
    queries = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    for w in queries:
        w.requires_grad_(True)
    memory, begin = PeakMemory(), time.perf_counter()
    optimizer = torch.optim.AdamW(queries, lr=args.learning_rate, weight_decay=0.01)
    times, losses = [], []
    for start in starts:
        started = time.perf_counter()
        prefix = DynamicCache()
        for index, layer in enumerate(cache.layers):
            prefix.update(layer.keys[:, :, :start], layer.values[:, :, :start], index)
        span = slice(start, start + args.rows)
        logits = model(input_ids=ids[:, span], past_key_values=prefix, use_cache=True,
                       position_ids=torch.arange(start, start + args.rows)[None]).logits[0]
        loss = F.cross_entropy(logits, ids[0, start + 1:start + args.rows + 1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(queries, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        times.append(1e3 * (time.perf_counter() - started))
    seconds = time.perf_counter() - begin
    emit(figure="adapt", seconds=round(seconds, 3), step_ms=round(sorted(times)[len(times) // 2], 1),
         best_step_ms=round(min(times), 1), steps=args.steps, rows=args.rows, learning_rate=args.learning_rate,
         seed=args.seed, peak_rss_mib=memory.mib(), starts=starts, losses=losses, **common)
    for w in queries:
        w.requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", choices=("prefill", "decode", "adapt"), action="append", help="may repeat")
    parser.add_argument("--model", type=pathlib.Path, default=DATA / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--novels", type=pathlib.Path, default=DATA / "Rdata.rdb")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128, help="of a span")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    load = dict(pretrained_model_name_or_path=str(args.model.parent), gguf_file=args.model.name)
    model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(**load)
    ids = tokenizer(first_novel(args.novels)[:8 * args.tokens + 4096], return_tensors="pt").input_ids[:, :args.tokens]
    if ids.shape[1] != args.tokens:
        sys.exit(f"--tokens: got {args.tokens}, the text has {ids.shape[1]}")
    common = dict(tokens=args.tokens, threads=args.threads)
    emit(figure="setup", seconds=round(time.perf_counter() - started, 1), torch=torch.__version__,
         transformers=transformers.__version__, attention=model.config._attn_implementation, dtype=str(model.dtype),
         cores=os.cpu_count(), load_average=round(os.getloadavg()[0], 2), first_ids=ids[0, :8].tolist(), **common)
    only = args.only or ["prefill", "decode", "adapt"]
    prefill(model, ids[:, :256], 0)  # warm
    if "prefill" in only:
        measure_prefill(model, ids, common)
    if "decode" in only:
        measure_decode(model, ids, common)
    if "adapt" in only:
        measure_adapt(model, ids, args, common)


if __name__ == "__main__":
    main()
