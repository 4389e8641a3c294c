#!/usr/bin/env python3
"""Query-only training against a frozen cache and its rivals at equal operations, in PyTorch and transformers.

    python3 bench/rivals.py --model bench/recall_model/model --tokens 3072 6144 --contexts 4

Ledgers as bench/recall_model/train.py draws them; any Llama or Qwen3 folder with at least as many tokens in its
vocabulary reads the same ids. A method may change weights or K/V after one prefill of the context; then the 1,536
tokens behind it are read, and every value there counts whose account stood in the context. `alone` are those of them
whose account stands in the context only, not earlier in the later tokens.

Operations are counted by python/src/refocus/evaluate/flops.py and the formulas below: what 32 steps of 128 rows of
plain query-only training cost on the same ledger is the budget of every rival, what it encodes again included. Each
method's learning rate is the best of a grid on a ledger that is not counted. Needs torch, transformers and
safetensors. bench/answers.py asks more about the method itself with the same pieces.
"""
import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

ROOT = pathlib.Path(__file__).resolve().parents[1]


def load_module(name, path):
    """A file of the repository as a module, without what stands beside it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load_module("tokenizer", ROOT / "bench/recall_model/tokenizer.py")  # train.py imports it by this name
ledgers = load_module("recall_model_train", ROOT / "bench/recall_model/train.py")
flops = load_module("refocus_flops", ROOT / "python/src/refocus/evaluate/flops.py")

LATER = 1536
MOST_TOKENS = 24576
STEPS, SPAN = 32, 128
ALONE_SPAN = 512  # of training on spans without what stands before them


@dataclasses.dataclass
class Ledger:
    tokens: int            # of the context
    ids: torch.Tensor      # [tokens + LATER]
    known: torch.Tensor    # rows of the context whose next token is a value that stood there before
    rows: torch.Tensor     # of the later tokens, counted from 0: accounts that the context has
    alone: torch.Tensor    # [len(rows)], bool: not earlier in the later tokens


def draw_ledger(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, known = ledgers.draw_contexts(1, tokens + LATER, generator, "cpu")
    ids = ids[0].to(torch.get_default_device())
    known = torch.nonzero(known[0, 1:tokens])[:, 0].to(ids.device)
    seen, again = set(ids[0:tokens:2].tolist()), set()
    rows, alone = [], []
    for row in range(0, LATER, 2):
        account = ids[tokens + row].item()
        if account in seen:
            rows.append(row)
            alone.append(account not in again)
        again.add(account)
    return Ledger(tokens, ids, known, torch.tensor(rows), torch.tensor(alone))


# ---- Reading

def load_model(folder):
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not (pathlib.Path(folder) / "config.json").is_file():
        raise SystemExit(f"--model: got {folder}, which has no config.json; give a folder of transformers' layout")
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="sdpa").eval()
    if model.config.vocab_size < ledgers.ledger.VOCABULARY:
        raise SystemExit(f"--model: got a vocabulary of {model.config.vocab_size}, the ledgers' ids need "
                         f"{ledgers.ledger.VOCABULARY}; take another model")
    return model.requires_grad_(False).to(torch.get_default_device())


def shape_of(config):
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return flops.Shape(config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                       config.num_key_value_heads, head_dim, config.intermediate_size, config.vocab_size)


class Attended:
    """K and V that rows attend to, in the place of transformers' cache: the first `limit` of frozen ones and, with
    `own`, those of the rows themselves behind them. Without `own` what the rows compute is dropped: they read their
    own frozen K/V."""

    def __init__(self, kv, limit, own):
        self.kv, self.limit, self.own = kv, limit, own

    def update(self, keys, values, layer, *_, **__):
        frozen = tuple(x[:, :, :self.limit] for x in self.kv[layer])
        if not self.own:
            return frozen
        return torch.cat((frozen[0], keys), 2), torch.cat((frozen[1], values), 2)


def additive(visible):
    """[rows, keys] bool -> what transformers adds to scores."""
    return torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)[None, None]


def prefill(model, ids, window=None):
    """[(K, V)] by layer, each [1, K/V heads, tokens, head size]. window: of tokens that each attends to."""
    mask = None
    if window:
        back = torch.arange(len(ids))[:, None] - torch.arange(len(ids))[None]
        mask = additive((back >= 0) & (back < window))
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=ids[None], attention_mask=mask, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def read(model, ids, positions, kv, visible, own, **options):
    """The transformer's output for rows `ids` at `positions` against frozen K/V; visible [rows, limit (+ rows)]."""
    limit = visible.shape[1] - (len(ids) if own else 0)
    return model.model(input_ids=ids[None], position_ids=positions[None], attention_mask=additive(visible),
                       past_key_values=Attended(kv, limit, own), use_cache=False, **options)


def own_visible(limit, rows):
    """All of the frozen keys, and among the rows the earlier ones."""
    return torch.cat((torch.ones(rows, limit, dtype=torch.bool), torch.ones(rows, rows, dtype=torch.bool).tril()), 1)


def later_logits(model, ledger, kv):
    """[len(ledger.rows), vocabulary]: what is predicted behind the later accounts, which are read behind `kv`."""
    t, visible = ledger.tokens, own_visible(kv[0][0].shape[2], LATER)
    with torch.no_grad():
        out = read(model, ledger.ids[t:], torch.arange(t, t + LATER), kv, visible, own=True)
        return model.lm_head(out.last_hidden_state[0, ledger.rows])


def recall(model, ledger, kv):
    """Percent of the later values that are found: of all, and of those whose account stands in the context alone."""
    found = later_logits(model, ledger, kv).argmax(-1) == ledger.ids[ledger.tokens + ledger.rows + 1]
    return 100 * found.float().mean().item(), 100 * found[ledger.alone].float().mean().item()


# ---- Losses of rows of a context

def row_loss(model, ledger, hidden, rows):
    return F.cross_entropy(model.lm_head(hidden), ledger.ids[rows + 1])


def frozen_loss(model, ledger, kv, rows):
    """Rows, in any order, read frozen K/V up to their own position: query-only training as the service does it."""
    visible = torch.arange(int(rows.max()) + 1)[None] <= rows[:, None]
    out = read(model, ledger.ids[rows], rows, kv, visible, own=False)
    return row_loss(model, ledger, out.last_hidden_state[0], rows)


def own_loss(model, ledger, kv, rows):
    """A span whose own K/V are computed anew, with gradients through them; frozen ones before it."""
    out = read(model, ledger.ids[rows], rows, kv, own_visible(int(rows[0]), len(rows)), own=True)
    return row_loss(model, ledger, out.last_hidden_state[0], rows)


def whole_loss(model, ledger, kv, rows):
    """A span with everything before it computed anew, with gradients through all K/V."""
    out = model.model(input_ids=ledger.ids[None, :int(rows[-1]) + 1], use_cache=False)
    return row_loss(model, ledger, out.last_hidden_state[0, rows], rows)


def alone_loss(model, ledger, kv, rows):
    """A span without what stands before it, at its own positions."""
    out = model.model(input_ids=ledger.ids[None, rows], position_ids=rows[None], use_cache=False)
    return row_loss(model, ledger, out.last_hidden_state[0], rows)


# ---- What a step costs, in operations. everything: all weights are trained, so that each matrix has a product of its
# own for its gradient; else W_Q's delta, with three products a row.

def trained(shape, rows, keyed, everything):
    """Matrices of `rows` rows, forward and backward, with W_K and W_V where `keyed`; no attention, no head."""
    linear = rows * flops.linear(shape, keys=keyed)
    if everything:
        return 3 * linear
    return 2 * linear + 3 * rows * 2 * shape.layers * shape.hidden * shape.query_size


def head_cost(shape, rows, everything):
    return rows * flops.head(shape) * (3 if everything else 2)


def frozen_cost(shape, rows, everything=False):
    return flops.adapt_step(shape, 0, len(rows), keys=float((rows + 1).sum()) / len(rows))


def own_cost(shape, rows, everything=False):
    """Of the span's own keys dK and dV besides: two products more, as many as forward."""
    n = len(rows)
    keys = n * int(rows[0]) + n * (n + 1) // 2
    return (trained(shape, n, True, everything) + head_cost(shape, n, everything)
            + flops.attention(shape, keys) * 5 // 2 + flops.attention(shape, n * (n + 1) // 2))


def whole_cost(shape, rows, everything=False):
    """Attention: two products forward and five backward (scores, dP, dQ, dK, dV)."""
    n = int(rows[-1]) + 1
    return (trained(shape, n, True, everything) + head_cost(shape, len(rows), everything)
            + flops.attention(shape, n * (n + 1) // 2) * 7 // 2)


def alone_cost(shape, rows, everything=False):
    return whole_cost(shape, torch.arange(len(rows)), everything)


# ---- Training

class QueryDelta:
    """q = x W_Q + x Delta: a matrix a layer, zero at first, added within `within`. The model's weights stay."""

    def __init__(self, model, layers=None):
        self.projections = [layer.self_attn.q_proj for layer in model.model.layers]
        self.weights = [torch.zeros_like(p.weight) for p in self.projections]
        self.trained = range(len(self.weights)) if layers is None else layers
        for layer in self.trained:
            self.weights[layer].requires_grad_(True)

    def parameters(self):
        return [self.weights[layer] for layer in self.trained]

    @contextlib.contextmanager
    def within(self):
        add = lambda weight: lambda module, inputs, output: output + F.linear(inputs[0], weight)
        hooks = [p.register_forward_hook(add(w)) for p, w in zip(self.projections, self.weights)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


def uniform_spans(ledger, span, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(ledger.tokens - span, (), generator=generator, device="cpu"))
        yield torch.arange(start, start + span)


def recall_rows(ledger, count, seed, begin=0.5):
    """Rows whose next value stood before, of the context behind the share `begin`: all in random order, then again."""
    generator = torch.Generator().manual_seed(seed)
    rows = ledger.known[ledger.known >= begin * ledger.tokens]
    order = rows[:0]
    while True:
        while len(order) < count:
            order = torch.cat((order, rows[torch.randperm(len(rows), generator=generator, device="cpu")]))
        yield order[:count]
        order = order[count:]


def train(parameters, loss_of, draws, cost_of, rate, steps=None, budget=None, seen=None):
    """AdamW, decay 0.01, clip 1.0, a constant rate; `steps`, or as many as `budget` pays. seen(step, loss) after each
    step. Returns steps and operations."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    done = spent = 0
    for rows in draws:
        cost = cost_of(rows)
        if done == steps or (budget is not None and spent + cost > budget):
            return done, spent
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done, spent = done + 1, spent + cost
        if seen:
            seen(done, loss.item())


def now():
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclasses.dataclass
class Result:
    recall: float
    alone: float
    steps: int = 0
    flops: int = 0
    seconds: float = 0.0


def adapt_queries(model, ledger, kv, loss, cost, rate, steps=None, budget=None, encode=False):
    """Trains a delta, encodes the context again with it if asked, and reads the later tokens with it."""
    shape, started = shape_of(model.config), now()
    again = flops.prefill(shape, ledger.tokens) if encode else 0
    delta = QueryDelta(model)
    with delta.within():
        done, spent = train(delta.parameters(), lambda rows: loss(model, ledger, kv, rows),
                            uniform_spans(ledger, SPAN, 5), lambda rows: cost(shape, rows), rate, steps,
                            None if budget is None else budget - again)
        if encode:
            kv = prefill(model, ledger.ids[:ledger.tokens])
        seconds = now() - started
        return Result(*recall(model, ledger, kv), done, spent + again, seconds)


def train_everything(model, ledger, kv, loss, cost, rate, span=SPAN, steps=None, budget=None):
    """Trains every weight of a copy, then encodes the context again."""
    shape, started = shape_of(model.config), now()
    again = flops.prefill(shape, ledger.tokens)
    copied = copy.deepcopy(model).requires_grad_(True)
    done, spent = train(list(copied.parameters()), lambda rows: loss(copied, ledger, kv, rows),
                        uniform_spans(ledger, span, 5), lambda rows: cost(shape, rows, True), rate, steps,
                        None if budget is None else budget - again)
    kv = prefill(copied.requires_grad_(False), ledger.ids[:ledger.tokens])
    seconds = now() - started
    return Result(*recall(copied, ledger, kv), done, spent + again, seconds)


def shuffled_values(kv, seed):
    """Every key with the value of another, random position."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda count: torch.randperm(count, generator=generator, device="cpu")
    return [(keys, values[:, :, drawn(values.shape[2])]) for keys, values in kv]


def random_kv(kv, seed):
    """Random directions, with every key's and value's own norm."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda x: torch.randn(x.shape, generator=generator, device="cpu").to(x.device)
    alike = lambda x: F.normalize(drawn(x), dim=-1) * x.norm(dim=-1, keepdim=True)
    return [(alike(keys), alike(values)) for keys, values in kv]


# By name: a function of model, ledger, its K/V, learning rate and budget. OVER are what the papers describe, over the
# budget.
def queries(loss, cost, **settings):
    return lambda model, ledger, kv, rate, budget: adapt_queries(
        model, ledger, kv, loss, cost, rate, **({"budget": budget} | settings))


def everything(loss, cost, **settings):
    return lambda model, ledger, kv, rate, budget: train_everything(
        model, ledger, kv, loss, cost, rate, **({"budget": budget} | settings))


RIVALS = {
    "qTTT, frozen K/V": queries(frozen_loss, frozen_cost),
    "qTTT, frozen K/V, then encoded again": queries(frozen_loss, frozen_cost, encode=True),
    "W_Q, the span's own K/V unfrozen": queries(own_loss, own_cost),
    "W_Q, the span's own K/V unfrozen, then encoded again": queries(own_loss, own_cost, encode=True),
    "W_Q, all K/V unfrozen, encoded again": queries(whole_loss, whole_cost, encode=True),
    "all weights, frozen K/V before the span, encoded again": everything(own_loss, own_cost),
    "all weights, all K/V unfrozen, encoded again": everything(whole_loss, whole_cost),
    f"all weights, spans of {ALONE_SPAN} alone, encoded again": everything(alone_loss, alone_cost, span=ALONE_SPAN),
}
OVER = {
    f"over budget: {STEPS} steps, W_Q, all K/V unfrozen, encoded again": queries(
        whole_loss, whole_cost, encode=True, steps=STEPS, budget=None),
    f"over budget: {STEPS} steps, all weights, all K/V unfrozen, encoded again": everything(
        whole_loss, whole_cost, steps=STEPS, budget=None),
    f"over budget: {STEPS} steps, all weights, spans of {ALONE_SPAN} alone, encoded again": everything(
        alone_loss, alone_cost, span=ALONE_SPAN, steps=STEPS, budget=None),
}
BASELINE = next(iter(RIVALS))


def budget_of(model, ledger):
    """What the baseline's steps cost on this ledger, at the spans that it draws."""
    spans = uniform_spans(ledger, SPAN, 5)
    return sum(frozen_cost(shape_of(model.config), next(spans)) for _ in range(STEPS))


def rates_of(name, options):
    return options.weight_rates if "all weights" in name else options.rates


def best_rates(model, tokens, options, methods):
    """By method: the rate with the best recall on a ledger of its own."""
    ledger = draw_ledger(tokens, 900)
    kv = prefill(model, ledger.ids[:tokens])
    best = {}
    for name, method in methods.items():
        found = {rate: method(model, ledger, kv, rate, budget_of(model, ledger)).recall
                 for rate in rates_of(name, options)}
        best[name] = max(found, key=found.get)
        print(f"{tokens}: {name}: recall by rate {found}", file=sys.stderr, flush=True)
    return best


def compare(model, tokens, options, methods):
    """Results by method, one a ledger."""
    best = best_rates(model, tokens, options, methods)
    results = {}
    for seed in range(1000, 1000 + options.contexts):
        ledger = draw_ledger(tokens, seed)
        kv, budget = prefill(model, ledger.ids[:tokens]), budget_of(model, ledger)
        nothing = [(k[:, :, :0], v[:, :, :0]) for k, v in kv]
        found = {"in-context": Result(*recall(model, ledger, kv)),
                 "the later tokens alone": Result(*recall(model, ledger, nothing))}
        for name, method in methods.items():
            found[name] = method(model, ledger, kv, best[name], budget)
        controls = {"values of other positions": shuffled_values(kv, seed), "random K/V": random_kv(kv, seed)}
        for label, control in controls.items():
            found[f"{label}, as they are"] = Result(*recall(model, ledger, control))
            found[f"{label}, qTTT"] = RIVALS[BASELINE](model, ledger, control, best[BASELINE], budget)
        for name, result in found.items():
            results.setdefault(name, []).append(result)
            print(json.dumps({"tokens": tokens, "seed": seed, "method": name, "rate": best.get(name),
                              **dataclasses.asdict(result)}), file=sys.stderr, flush=True)
    return best, results


def table(tokens, shape, best, results):
    mean = lambda found, field: statistics.fmean(getattr(x, field) for x in found)
    prefilled = flops.prefill(shape, tokens) / 1e9
    lines = [f"{tokens} tokens; the prefill that all begin with: {prefilled:.0f} GFLOP", "",
             "| method | rate | steps | GFLOP behind the prefill | seconds | found, % | lowest to highest | alone, % |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, found in results.items():
        rate = best.get(name, best[BASELINE] if name.endswith(", qTTT") else None)
        work = ["", "", "", ""] if rate is None else [
            f"{rate:g}", f"{mean(found, 'steps'):.1f}", f"{mean(found, 'flops') / 1e9:.0f}",
            f"{mean(found, 'seconds'):.1f}"]
        recalls = [x.recall for x in found]
        lines.append("| " + " | ".join([name, *work, f"{mean(found, 'recall'):.1f}", f"{min(recalls):.1f} to "
                                        f"{max(recalls):.1f}", f"{mean(found, 'alone'):.1f}"]) + " |")
    return "\n".join(lines)


def check_tokens(lengths, least=2 * ALONE_SPAN):
    for tokens in lengths:
        if tokens < least or tokens > MOST_TOKENS or tokens % 2:
            raise SystemExit(f"--tokens: got {tokens}, allowed even numbers from {least} to {MOST_TOKENS}")


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def machine():
    if torch.get_default_device().type == "cuda":
        return f"one {torch.cuda.get_device_name()}, fp32, torch {torch.__version__}"
    return (f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), fp32, "
            f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "bench/recall_model/model")
    parser.add_argument("--contexts", type=int, default=4, help="ledgers of each length")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="draws are the same on both")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def prepare_torch(options):
    """Before a model is loaded: new tensors lie on --device, the generators' draws on the CPU."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: got cuda, allowed cpu: torch finds no GPU")
    torch.set_default_device(options.device)
    torch.set_num_threads(options.threads)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[3072, 6144])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 9e-3], help="of W_Q")
    parser.add_argument("--weight-rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4], help="of all weights")
    parser.add_argument("--over", action="store_true", help=f"also rivals of {STEPS} steps, whatever they cost")
    options = parser.parse_args()
    check_tokens(options.tokens)
    prepare_torch(options)
    model = load_model(options.model)
    for tokens in options.tokens:
        best, results = compare(model, tokens, options, RIVALS | (OVER if options.over else {}))
        print(table(tokens, shape_of(model.config), best, results), flush=True)
        print(f"\n{options.contexts} ledgers; {machine()}\n", flush=True)


if __name__ == "__main__":
    main()
