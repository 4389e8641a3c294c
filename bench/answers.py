#!/usr/bin/env python3
"""Measurements of query-only training on ledgers, one question each; docs/answers.md has the tables and what they mean.

    python3 bench/answers.py spans steps transfer delta keys --contexts 4

Models, ledgers, recall and training are those of bench/rivals.py. Learning rates are named in each table; where a table
compares settings, each has the best of --rates on a ledger that is not counted.
"""
import statistics

import torch
import torch.nn.functional as F

import rivals

SHAPES = ((8, 512), (16, 256), (32, 128), (64, 64), (128, 32))  # steps x rows: 4,096 rows each
MARKS = (8, 16, 32, 64, 128)
RATE = 4e-3
mean = statistics.fmean


def draws_of(kind, ledger, rows, seed=5):
    return (rivals.uniform_spans if kind == "uniform" else rivals.recall_rows)(ledger, rows, seed)


class Prepared:
    """A ledger and the K/V of its context."""

    def __init__(self, model, tokens, seed, window=None):
        self.ledger = rivals.draw_ledger(tokens, seed)
        self.kv = rivals.prefill(model, self.ledger.ids[:tokens], window)

    def found(self, model, delta=None):
        if delta is None:
            return rivals.recall(model, self.ledger, self.kv)[0]
        with delta.within():
            return rivals.recall(model, self.ledger, self.kv)[0]


def prepare(model, tokens, contexts, window=None):
    return [Prepared(model, tokens, 1000 + i, window) for i in range(contexts)]


def adapted(model, prepared, kind="uniform", steps=32, rows=128, rate=RATE, layers=None, seen=None, delta=None):
    """The delta after `steps` steps on frozen K/V; goes on with `delta` if given."""
    delta = delta or rivals.QueryDelta(model, layers)
    shape = rivals.shape_of(model.config)
    with delta.within():
        rivals.train(delta.parameters(), lambda r: rivals.frozen_loss(model, prepared.ledger, prepared.kv, r),
                     draws_of(kind, prepared.ledger, rows), lambda r: rivals.frozen_cost(shape, r), rate, steps=steps,
                     seen=seen)
    return delta


def table(head, lines):
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    print("\n".join("| " + " | ".join(str(x) for x in row) + " |" for row in rows), flush=True)


def percent(values):
    return f"{mean(values):.1f}"


def spans(model, tokens, contexts, rates):
    """Span length against steps: the same number of rows in all."""
    tried, counted = Prepared(model, tokens, 900), prepare(model, tokens, contexts)
    lines = [["in-context", "", percent([p.found(model) for p in counted]), "", ""]]
    for kind in ("uniform", "recall"):
        for steps, rows in SHAPES:
            settings = dict(kind=kind, steps=steps, rows=rows)
            found = {rate: tried.found(model, adapted(model, tried, rate=rate, **settings)) for rate in rates}
            rate, started = max(found, key=found.get), rivals.now()
            deltas = [adapted(model, p, rate=rate, **settings) for p in counted]
            seconds = (rivals.now() - started) / contexts
            recalls = [p.found(model, delta) for p, delta in zip(counted, deltas)]
            lines.append([f"{kind}, {steps} x {rows}", f"{rate:g}", percent(recalls),
                          f"{min(recalls):.1f} to {max(recalls):.1f}", f"{seconds:.1f}"])
    table([f"{tokens} tokens", "rate", "found, %", "lowest to highest", "seconds"], lines)


def steps(model, tokens, contexts, rates):
    """Recall and loss of the later values after so many steps."""
    lines = []
    for kind, rows in (("uniform", 128), ("recall", 64)):
        recalls, nats = {}, {}

        def look(p, done):
            recalls.setdefault(done, []).append(p.found(model))
            nats.setdefault(done, []).append(later_loss(model, p))

        for p in prepare(model, tokens, contexts):
            look(p, 0)
            adapted(model, p, kind, MARKS[-1], rows, seen=lambda done, loss: done in MARKS and look(p, done))
        lines.append([f"{kind}, {rows} rows a step: found, %", *(percent(recalls[n]) for n in (0, *MARKS))])
        lines.append(["nats of the later values", *(f"{mean(nats[n]):.2f}" for n in (0, *MARKS))])
    table([f"{tokens} tokens, {contexts} ledgers, rate {RATE:g}, steps:", 0, *MARKS], lines)


def later_loss(model, prepared):
    ledger = prepared.ledger
    targets = ledger.ids[ledger.tokens + ledger.rows + 1]
    return F.cross_entropy(rivals.later_logits(model, ledger, prepared.kv), targets).item()


def transfer(model, tokens, contexts, rates):
    """Adapters made on one ledger, used on each; and one made on all other ledgers in turn."""
    counted = prepare(model, tokens, contexts)
    lines = [["in-context", *[percent([p.found(model) for p in counted])] * 3]]
    for kind in ("uniform", "recall"):
        deltas = [adapted(model, p, kind) for p in counted]
        own = [p.found(model, delta) for p, delta in zip(counted, deltas)]
        others = [p.found(model, delta) for p in counted for q, delta in zip(counted, deltas) if p is not q]
        chained = []
        for p in counted:
            delta = None
            for q in counted:
                delta = delta if p is q else adapted(model, q, kind, delta=delta)
            chained.append(p.found(model, delta))
        lines.append([kind, percent(own), f"{percent(others)} ({min(others):.1f} to {max(others):.1f})",
                      percent(chained)])
    table([f"{tokens} tokens, 32 x 128, rate {RATE:g}", "own, %", "another's, %", f"{contexts - 1} others' in turn, %"],
          lines)


def delta(model, tokens, contexts, rates):
    """Layers trained alone and left out; the size of the delta; attention on the evidence."""
    counted = prepare(model, tokens, contexts)
    layers = range(model.config.num_hidden_layers)
    trained = lambda chosen: [adapted(model, p, layers=chosen) for p in counted]
    found = lambda deltas: percent([p.found(model, d) for p, d in zip(counted, deltas)])
    everywhere = trained(list(layers))
    lines = [[layer, found(trained([layer])), found(trained([i for i in layers if i != layer]))] for layer in layers]
    print(f"{tokens} tokens, uniform 32 x 128, rate {RATE:g}; in-context "
          f"{percent([p.found(model) for p in counted])} %, all layers {found(everywhere)} %\n")
    table(["layer", "trained alone, %", "all but this one, %"], lines)
    before = [evidence_mass(model, p) for p in counted]
    after = []
    for p, d in zip(counted, everywhere):
        with d.within():
            after.append(evidence_mass(model, p))
    print()
    table(["layer", "norm of the delta / W_Q, %", "by head", "on the evidence before, % by head", "after"],
          [[layer, *sizes(model, everywhere, layer), shares(before, layer), shares(after, layer)] for layer in layers])


def sizes(model, deltas, layer):
    heads = model.config.num_attention_heads
    weight = model.model.layers[layer].self_attn.q_proj.weight
    by_head = lambda x: x.detach().view(heads, -1).norm(dim=1)
    each = torch.stack([by_head(d.weights[layer]) / by_head(weight) for d in deltas]).mean(0)
    whole = mean([(d.weights[layer].norm() / weight.norm()).item() for d in deltas])
    return f"{100 * whole:.1f}", " ".join(f"{100 * x:.1f}" for x in each)


def shares(masses, layer):
    return " ".join(f"{100 * x:.1f}" for x in torch.stack(masses).mean(0)[layer])


def evidence_mass(model, prepared):
    """[layers, heads]: share of attention on the values behind the same account in the context, mean over the later
    accounts that stand in the context alone."""
    ledger, t = prepared.ledger, prepared.ledger.tokens
    rows = ledger.rows[ledger.alone]
    evidence = torch.zeros(len(rows), t + rivals.LATER)
    evidence[:, 1:t] = (ledger.ids[None, :t - 1] == ledger.ids[t + rows][:, None]).float()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = rivals.read(model, ledger.ids[t:], torch.arange(t, t + rivals.LATER), prepared.kv,
                          rivals.own_visible(t, rivals.LATER), own=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return torch.stack([(a[0][:, rows] * evidence).sum(-1).mean(-1) for a in out.attentions])


def keys(model, tokens, contexts, rates):
    """How much of the limit is in the frozen K/V: contexts encoded as they are, with attention to the last 256 tokens
    alone, and a second time with adapted queries."""
    lines = []
    for label, window in (("as it is", None), ("each token sees the last 256", 256)):
        counted = prepare(model, tokens, contexts, window)
        row = [label, percent([p.found(model) for p in counted])]
        for kind in ("uniform", "recall"):
            deltas = [adapted(model, p, kind, *((32, 128) if kind == "uniform" else (64, 64))) for p in counted]
            row.append(percent([p.found(model, d) for p, d in zip(counted, deltas)]))
            again = []
            for p, d in zip(counted, deltas):
                with d.within():
                    kv = rivals.prefill(model, p.ledger.ids[:tokens], window)
                    again.append(rivals.recall(model, p.ledger, kv)[0])
            row.append(percent(again))
        lines.append(row)
    table([f"{tokens} tokens; the context was encoded", "in-context, %", "uniform 32 x 128, %", "then encoded again, %",
           "recall rows 64 x 64, %", "then encoded again, %"], lines)


QUESTIONS = {f.__name__: f for f in (spans, steps, transfer, delta, keys)}


def main():
    parser = rivals.arguments(__doc__)
    parser.add_argument("questions", nargs="+", choices=QUESTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[6144])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 9e-3])
    options = parser.parse_args()
    rivals.check_tokens(options.tokens)
    rivals.prepare_torch(options)
    model = rivals.load_model(options.model)
    for question in options.questions:
        for tokens in options.tokens:
            started = rivals.now()
            print(f"\n### {question}\n")
            QUESTIONS[question](model, tokens, options.contexts, options.rates)
            seconds = rivals.now() - started
            print(f"\n{options.contexts} ledgers, {seconds:.0f} s; {rivals.machine()}\n", flush=True)


if __name__ == "__main__":
    main()
