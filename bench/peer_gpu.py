#!/usr/bin/env python3
"""The same work as context_bench on a GPU, as a transformers user would do it: chunked prefill into a DynamicCache,
decoding, and query-only training steps against the frozen cache with autograd and fused AdamW; SDPA, bf16.

    context_bench --model FOLDER --random-weights 1 --device cuda --tokens 32768 --at 0.5 --results ours.json
    python3 bench/peer_gpu.py FOLDER --seed 1 --tokens 32768 --at 0.5 --ours ours.json

Weights come from random_weights.py, so both sides hold the same values. With --ours it also says how far our first loss is
from transformers' in bf16 and, with --exact, from the same model in fp64. Later losses differ by more than roundings:
here the gradient flows through the K and V of the span's own rows, which Refocus keeps frozen. Token ids
are the bench's own (std::mt19937_64, seed 1). Prints one JSON line per figure, a table last.
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import random_weights

CHUNK = 16384
DEVICE = "cuda"


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
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = function()
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
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(default)
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
    """Query-only steps: base weights stay, `deltas` (zero at the start) are added in the forward pass by a hook."""

    def __init__(self, model, rate):
        self.model = model
        self.projections = [layer.self_attn.q_proj for layer in model.model.layers]
        # In bf16 the recipe trains the weights themselves; a delta of its own is exact where compared with fp64.
        self.exact = next(model.parameters()).dtype == torch.float64
        for projection in self.projections:
            projection.weight.requires_grad_(True)
        self.weights = [projection.weight for projection in self.projections]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.0, fused=not self.exact)

    def step(self, cache, ids, start, span):
        part = prefix(self.model, cache, start)
        positions = torch.arange(start, start + span, device=DEVICE)[None]

        def run():
            logits = self.model(input_ids=ids[:, start:start + span], past_key_values=part, use_cache=True,
                                position_ids=positions).logits[0]
            loss = F.cross_entropy(logits if self.exact else logits.float(), ids[0, start + 1:start + span + 1])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach(), norm

        (loss, norm), seconds = timed(run)
        return loss.item(), norm.item(), seconds

    def close(self):
        for projection in self.projections:
            projection.weight.requires_grad_(False)


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
    parser.add_argument("--exact", action="store_true", help="also fp64, for losses; few layers and tokens")
    args = parser.parse_args()

    rows, losses = [], {}
    for dtype in [torch.bfloat16] + ([torch.float64] if args.exact else []):
        model = make(args.model, args.seed, args.layers, dtype)
        for tokens in args.tokens:
            torch.cuda.reset_peak_memory_stats()
            values = mt19937_64(1, tokens)
            ids = torch.tensor([[v % model.config.vocab_size for v in values]], device=DEVICE)
            cache, seconds = timed(lambda: prefill(model, ids))
            if dtype == torch.bfloat16:
                rows.append(("prefill", tokens, seconds * 1e3 / tokens, seconds))
                each = decode(model, cache, ids, args.decode)
                rows.append(("decode", tokens, each * 1e3, each * args.decode))
            steps = Steps(model, args.rate)
            spent, losses[dtype] = [], []
            last = tokens - args.span - 1
            for step in range(args.steps):
                loss, norm, one = steps.step(cache, ids, min(last, int(args.at * tokens) + step), args.span)
                spent.append(one)
                losses[dtype].append((loss, norm))
            steps.close()
            if dtype == torch.bfloat16:
                rows.append(("adapt step", tokens, median(spent) * 1e3, sum(spent)))
                random_weights.fill(model, args.seed)
            peak = torch.cuda.max_memory_allocated() / 1e9
            print(json.dumps({"tokens": tokens, "dtype": str(dtype), "peak_GB": round(peak, 2)}), flush=True)
            del cache, steps, ids
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()

    print(f"# transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print("| phase | tokens | seconds | ms a unit |\n|---|---:|---:|---:|")
    for phase, tokens, unit, seconds in rows:
        print(f"| {phase} | {tokens} | {seconds:.3f} | {unit:.3f} |")
    if args.ours:
        ours = json.load(open(args.ours))
        names = {torch.bfloat16: "transformers bf16", torch.float64: "fp64"}
        for dtype, theirs in losses.items():
            print(f"ours against {names[dtype]}: first loss off by {abs(ours['losses'][0] - theirs[0][0]):.2e}")
        if len(losses) == 2:
            off = abs(losses[torch.bfloat16][0][0] - losses[torch.float64][0][0])
            print(f"transformers bf16 against fp64: first loss off by {off:.2e}")
        print("ours:", [round(x, 5) for x in ours["losses"][:args.steps]])
        print("theirs:", [round(x[0], 5) for x in losses[torch.bfloat16]])


if __name__ == "__main__":
    main()
