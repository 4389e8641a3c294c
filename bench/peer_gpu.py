#!/usr/bin/env python3
"""The same work as context_bench on a GPU, as a transformers user would do it: chunked prefill into a DynamicCache,
decoding, and query-only training steps against the frozen cache with autograd and fused AdamW; SDPA, bf16.

    context_bench --model FOLDER --random-weights 1 --device cuda --tokens 32768 --at 0.5 --results ours.json
    python3 bench/peer_gpu.py FOLDER --seed 1 --tokens 32768 --at 0.5 --ours ours.json

Weights come from random_weights.py, so both sides hold the same values; token ids are the bench's own (std::mt19937_64,
seed 1). Prints one JSON line per figure, a table last. With --exact nothing is timed: the steps are taken with a delta
beside the weights and with K and V of the whole context frozen, as Refocus does, by transformers in bf16 and in fp64,
and --ours is compared with both. (The timed recipe trains the weights themselves, and its gradient flows through the K
and V of the span's own rows.) Runs on the CPU where there is no GPU.
"""
import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import random_weights

CHUNK = 16384
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mt19937_64(seed, count):
    """std::mt19937_64."""
    n, mask = 312, (1 << 64) - 1
    state = [seed & mask]
    for i in range(1, n):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & mask)
    out = []
    while len(out) < count:
        for i in range(n):
            x = (state[i] & 0xFFFFFFFF80000000) | (state[(i + 1) % n] & 0x7FFFFFFF)
            state[i] = state[(i + 156) % n] ^ (x >> 1) ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        for y in state:
            y ^= (y >> 29) & 0x5555555555555555
            y ^= (y << 17) & 0x71D67FFFEDA60000
            y ^= (y << 37) & 0xFFF7EEE000000000
            out.append(y ^ (y >> 43))
    return out[:count]


def timed(function):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def median(values):
    return sorted(values)[len(values) // 2]


def make(folder, seed, layers, dtype):
    config = AutoConfig.from_pretrained(folder)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config._attn_implementation = "sdpa" if dtype != torch.float64 else "eager"
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    random_weights.fill(model, seed)
    return model.requires_grad_(False)


@torch.no_grad()
def prefill(model, ids):
    cache = DynamicCache()
    for begin in range(0, ids.shape[1], CHUNK):
        model(input_ids=ids[:, begin:begin + CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def prefix(model, cache, tokens):
    part = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        part.update(cache.layers[layer].keys[:, :, :tokens], cache.layers[layer].values[:, :, :tokens], layer)
    return part


@torch.no_grad()
def decode(model, cache, ids, count):
    tokens = ids.shape[1]
    part = prefix(model, cache, tokens - 1)
    token, seconds = ids[:, -1:], []
    model(input_ids=token, past_key_values=part, use_cache=True)
    token = ids[:, :1]
    for _ in range(count):
        out, spent = timed(lambda: model(input_ids=token, past_key_values=part, use_cache=True))
        token = out.logits[:, -1:].argmax(-1)
        seconds.append(spent)
    return median(seconds)


class Steps:
    """Query-only steps as the recipe takes them: on the weights of the query projections."""

    def __init__(self, model, rate):
        self.model = model
        self.weights = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in model.model.layers]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.0, fused=True)

    def step(self, cache, ids, start, span):
        part = prefix(self.model, cache, start)
        positions = torch.arange(start, start + span, device=DEVICE)[None]

        def run():
            logits = self.model(input_ids=ids[:, start:start + span], past_key_values=part, use_cache=True,
                                position_ids=positions).logits[0]
            loss = F.cross_entropy(logits.float(), ids[0, start + 1:start + span + 1])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

        return timed(run)[1]

    def close(self):
        for weight in self.weights:
            weight.requires_grad_(False)


class FrozenCache(DynamicCache):
    """K and V of a whole context, which no forward pass adds to."""

    def __init__(self, cache):
        super().__init__()
        self.layers = cache.layers

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.layers[layer_idx].keys, self.layers[layer_idx].values


class Queries(torch.nn.Module):
    """A query projection with a delta beside its weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self.delta = torch.nn.Parameter(torch.zeros_like(weight, dtype=wide))

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(x, self.delta.to(x.dtype))


def frozen_losses(model, cache, ids, starts, span, rate):
    """Losses and gradient norms of steps with Refocus' definition of them."""
    for layer in model.model.layers:
        layer.self_attn.q_proj = Queries(layer.self_attn.q_proj.weight)
    deltas = [layer.self_attn.q_proj.delta for layer in model.model.layers]
    optimizer = torch.optim.AdamW(deltas, lr=rate, weight_decay=0.01)
    dtype, tokens, losses = next(model.parameters()).dtype, ids.shape[1], []
    for start in starts:
        positions = torch.arange(start, start + span, device=DEVICE)
        hidden = torch.arange(tokens, device=DEVICE)[None] > positions[:, None]
        mask = torch.zeros(1, 1, span, tokens, dtype=dtype, device=DEVICE).masked_fill(hidden, torch.finfo(dtype).min)
        logits = model(input_ids=ids[:, start:start + span], past_key_values=FrozenCache(cache), use_cache=True,
                       position_ids=positions[None], attention_mask=mask).logits[0]
        wide = logits if dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide, ids[0, start + 1:start + span + 1])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(deltas, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item()))
    return losses


def compare(args, ids_of):
    """Losses of every step: ours, and transformers' in both precisions."""
    ours = json.load(open(args.ours))
    tokens = args.tokens[-1]
    starts = [min(tokens - args.span - 1, int(args.at * tokens) + step) for step in range(args.steps)]
    theirs = {}
    for dtype in (torch.bfloat16, torch.float64):
        model = make(args.model, args.seed, args.layers, dtype)
        ids = ids_of(model, tokens)
        theirs[dtype] = frozen_losses(model, prefill(model, ids), ids, starts, args.span, args.rate)
        del model
    print("| step | ours | transformers bf16 | fp64 | norm, ours | bf16 | fp64 |\n|---|---:|---:|---:|---:|---:|---:|")
    worst = {"ours": 0.0, "transformers bf16": 0.0}
    for step, (bf16, fp64) in enumerate(zip(theirs[torch.bfloat16], theirs[torch.float64])):
        mine = ours["losses"][step], ours["grad_norms"][step]
        print(f"| {step + 1} | {mine[0]:.6f} | {bf16[0]:.6f} | {fp64[0]:.6f} | {mine[1]:.5f} | {bf16[1]:.5f} | {fp64[1]:.5f} |")
        worst["ours"] = max(worst["ours"], abs(mine[0] - fp64[0]))
        worst["transformers bf16"] = max(worst["transformers bf16"], abs(bf16[0] - fp64[0]))
    print("# largest error of a loss:", ", ".join(f"{name} {value:.2e}" for name, value in worst.items()))
    return 0 if worst["ours"] <= 2 * worst["transformers bf16"] else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with config.json")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=[32768])
    parser.add_argument("--at", type=float, default=0.5)
    parser.add_argument("--span", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--decode", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--ours", help="what context_bench wrote with --results, for the last of --tokens")
    parser.add_argument("--exact", action="store_true", help="compare losses with --ours; few layers and tokens")
    args = parser.parse_args()
    if args.exact and not args.ours:
        parser.error("--exact: compares with --ours, which is missing")

    def ids_of(model, tokens):
        values = mt19937_64(1, tokens)
        return torch.tensor([[v % model.config.vocab_size for v in values]], device=DEVICE)

    if args.exact:
        return compare(args, ids_of)
    rows = []
    model = make(args.model, args.seed, args.layers, torch.bfloat16)
    for tokens in args.tokens:
        torch.cuda.reset_peak_memory_stats()
        ids = ids_of(model, tokens)
        cache, seconds = timed(lambda: prefill(model, ids))
        rows.append(("prefill", tokens, seconds * 1e3 / tokens, seconds))
        each = decode(model, cache, ids, args.decode)
        rows.append(("decode", tokens, each * 1e3, each * args.decode))
        steps = Steps(model, args.rate)
        last = tokens - args.span - 1
        try:
            spent = [steps.step(cache, ids, min(last, int(args.at * tokens) + step), args.span)
                     for step in range(args.steps)]
            rows.append(("adapt step", tokens, median(spent) * 1e3, sum(spent)))
        except torch.OutOfMemoryError as error:
            print(f"# adaptation steps at {tokens} tokens do not fit: {str(error).splitlines()[0]}", flush=True)
        steps.close()
        random_weights.fill(model, args.seed)
        print(json.dumps({"tokens": tokens, "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2)}), flush=True)
        del cache, steps, ids
        torch.cuda.empty_cache()

    print(f"# transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print("| phase | tokens | seconds | ms a unit |\n|---|---:|---:|---:|")
    for phase, tokens, unit, seconds in rows:
        print(f"| {phase} | {tokens} | {seconds:.3f} | {unit:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
