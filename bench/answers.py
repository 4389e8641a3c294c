#!/usr/bin/env python3
"""Measurements of query-only training on ledgers, one question each; docs/answers.md has the tables and what they mean.

    python3 bench/answers.py spans steps transfer delta keys --contexts 4

Models, ledgers, recall and training are those of bench/rivals.py. Learning rates are named in each table; where a table
compares settings, each has the best of --rates on a ledger that is not counted.

spans: rows of a step against steps. steps: how many. transfer: adapters on other ledgers. delta: what it changes. keys:
what the frozen K/V limit. mass: attention on the evidence as the objective. refine: further steps for one question.
"""
import dataclasses
import statistics

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

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


def adapted(model, prepared, kind="uniform", steps=32, rows=128, rate=RATE, layers=None, seen=None, delta=None,
            loss=rivals.frozen_loss, cost=rivals.frozen_cost, budget=None):
    """The delta after `steps` steps on frozen K/V, or as many as `budget` pays; goes on with `delta` if given."""
    delta = delta or rivals.QueryDelta(model, layers)
    shape = rivals.shape_of(model.config)
    with delta.within():
        rivals.train(delta.parameters(), lambda r: loss(model, prepared.ledger, prepared.kv, r),
                     draws_of(kind, prepared.ledger, rows), lambda r: cost(shape, r), rate, steps, budget, seen)
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


# ---- Attention on the evidence as the objective

def attend_noting(module, query, keys, values, mask, scaling, evidence, noted, **_):
    """Notes each head's and row's log of the attention on `evidence` [rows, keys] by layer, up to the last of `noted`,
    behind which nothing is read."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    scores = query @ keys.transpose(2, 3) * scaling + mask
    if module.layer_idx in noted:
        on_evidence = scores.masked_fill(~evidence, float("-inf"))
        noted[module.layer_idx] = (on_evidence.logsumexp(-1) - scores.logsumexp(-1))[0]
    if module.layer_idx >= max(noted):
        return torch.zeros_like(query).transpose(1, 2), None
    values = values.repeat_interleave(query.shape[1] // values.shape[1], 1)
    return (scores.softmax(-1) @ values).transpose(1, 2), None


AttentionInterface.register("noting", attend_noting)


def log_masses(model, ledger, kv, rows, layers):
    """By layer [heads, rows]: log of the attention that rows give to what stood behind the same token before them."""
    limit = torch.arange(int(rows.max()) + 1)
    visible = limit[None] <= rows[:, None]
    behind = (ledger.ids[limit - 1][None] == ledger.ids[rows][:, None]) & (limit > 0)
    noted = dict.fromkeys(layers)
    model.set_attn_implementation("noting")
    try:
        rivals.read(model, ledger.ids[rows], rows, kv, visible, own=False, evidence=behind & visible, noted=noted)
    finally:
        model.set_attn_implementation("sdpa")
    return noted


def mass_loss(layers, pooled):
    """pooled: the log of the heads' mean, else the mean of their logs."""
    def loss(model, ledger, kv, rows):
        masses = log_masses(model, ledger, kv, rows, layers).values()
        return -sum((m.exp().mean(0).log() if pooled else m).mean() for m in masses)
    return loss


def mass_cost(layers):
    """All of the layers before the last of `layers`; of that one W_Q, its delta, scores (once more backward) and dQ; no
    values, no MLP, no head."""
    def cost(shape, rows):
        below, one = (dataclasses.replace(shape, layers=n) for n in (max(layers), 1))
        n, keys = len(rows), int((rows + 1).sum())
        return (rivals.trained(below, n, False, False) + rivals.flops.attention(below, keys) * 5 // 2
                + 5 * n * 2 * shape.hidden * shape.query_size + rivals.flops.attention(one, keys) * 3 // 2)
    return cost


def mass_methods(layers):
    """By name: settings of `adapted`, of which the better on the ledger that is not counted is taken."""
    masses = lambda chosen: {label: dict(kind="recall", rows=64, loss=mass_loss(chosen, pooled), cost=mass_cost(chosen))
                             for label, pooled in (("mean of logs", False), ("log of the mean", True))}
    return {"next token, uniform, 128 rows": {"": {}},
            "next token, recall, 64 rows": {"": dict(kind="recall", rows=64)},
            "mass at the last layer, 64 rows": masses([layers - 1]),
            "mass at all layers, 64 rows": masses(list(range(layers)))}


def mass(model, tokens, contexts, rates):
    """Attention on the evidence as the objective, against the next token, at the operations of 32 x 128 uniform."""
    tried, counted = Prepared(model, tokens, 900), prepare(model, tokens, contexts)
    layers = range(model.config.num_hidden_layers)
    lines = [["in-context", "", "", "", percent([p.found(model) for p in counted]), ""]]
    masses = [["in-context", [evidence_mass(model, p) for p in counted]]]
    for name, variants in mass_methods(len(layers)).items():
        spent = lambda p, rate, settings, seen=None: adapted(
            model, p, rate=rate, steps=None, budget=rivals.budget_of(model, p.ledger), seen=seen, **settings)
        found = {(label, rate): tried.found(model, spent(tried, rate, settings))
                 for label, settings in variants.items() for rate in rates}
        print(f"{name}: {found}", flush=True)
        label, rate = max(found, key=found.get)
        done, recalls, after = [], [], []
        for p in counted:
            marks = []
            with spent(p, rate, variants[label], lambda step, loss: marks.append(step)).within():
                recalls.append(p.found(model))
                after.append(evidence_mass(model, p))
            done.append(len(marks))
        lines.append([name, label, f"{rate:g}", f"{mean(done):.1f}", *spread(recalls)])
        masses.append([name, after])
    print()
    table([f"{tokens} tokens", "heads", "rate", "steps", "found, %", "lowest to highest"], lines)
    print()
    table(["on the evidence, % by head", *(f"layer {layer}" for layer in layers)],
          [[name, *(shares(found, layer) for layer in layers)] for name, found in masses])


# ---- Further steps for one question

QUESTIONS_ASKED = 50   # of a ledger
REFINED = 4            # steps for a question
REFINED_ROWS = 32


def asked(model, prepared, accounts):
    """The values found where each account stands behind the context apart from the others."""
    t, n = prepared.ledger.tokens, len(accounts)
    visible = torch.cat((torch.ones(n, t, dtype=torch.bool), torch.eye(n, dtype=torch.bool)), 1)
    with torch.no_grad():
        out = rivals.read(model, accounts, torch.full((n,), t), prepared.kv, visible, own=True)
        return model.lm_head(out.last_hidden_state[0]).argmax(-1)


def question_rows(ledger, account, count):
    """Where the account stands in the context, then the nearest rows that recall others."""
    own = torch.nonzero(ledger.ids[:ledger.tokens - 1] == account)[:, 0]
    others = ledger.known[ledger.ids[ledger.known] != account]
    near = (others[:, None] - own[None]).abs().amin(1).argsort(stable=True)
    return torch.cat((own, others[near]))[:count]


def refined(model, prepared, shared, account, rate, own_alone=False):
    """The value found after REFINED steps for this account from the weights `shared`, which stay; and their cost."""
    rows = question_rows(prepared.ledger, account, REFINED_ROWS)
    if own_alone:
        rows = rows[prepared.ledger.ids[rows] == account]
    delta, shape = rivals.QueryDelta(model), rivals.shape_of(model.config)
    for weight, start in zip(delta.weights, shared):
        weight.data.copy_(start)
    with delta.within():
        _, spent = rivals.train(delta.parameters(),
                                lambda r: rivals.frozen_loss(model, prepared.ledger, prepared.kv, r),
                                iter([rows] * (REFINED + 1)), lambda r: rivals.frozen_cost(shape, r), rate, REFINED)
        return asked(model, prepared, account[None])[0], spent


class Questions:
    """Accounts that stand in the context alone, their values, and what is found: by the shared delta after so many
    steps, and by further ones for each question."""

    def __init__(self, model, prepared, kind, marks):
        ledger = prepared.ledger
        rows = ledger.tokens + ledger.rows[ledger.alone][:QUESTIONS_ASKED]
        self.model, self.prepared, self.accounts, self.values = model, prepared, ledger.ids[rows], ledger.ids[rows + 1]
        self.shared, self.marks, self.found = None, marks, {0: self.right(asked(model, prepared, self.accounts))}
        delta = rivals.QueryDelta(model)
        adapted(model, prepared, kind, marks[-1], seen=lambda done, loss: self.look(done, delta), delta=delta)

    def right(self, found):
        return 100 * (found == self.values).float().mean().item()

    def look(self, done, delta):
        if done == self.marks[0]:
            self.shared = [w.detach().clone() for w in delta.weights]
        if done in self.marks:
            self.found[done] = self.right(asked(self.model, self.prepared, self.accounts))

    def refine(self, rate, own_alone):
        """Percent found, and the mean operations of a question's steps."""
        each = [refined(self.model, self.prepared, self.shared, a, rate, own_alone) for a in self.accounts]
        return self.right(torch.stack([found for found, _ in each])), mean([spent for _, spent in each])


def refine(model, tokens, contexts, rates):
    """A few steps for one question from a shared delta, against as many more shared steps."""
    marks = (32, 33, 32 + REFINED * REFINED_ROWS * QUESTIONS_ASKED // 128)
    tried, counted = Prepared(model, tokens, 900), prepare(model, tokens, contexts)
    shape, lines = rivals.shape_of(model.config), []
    for kind in ("uniform", "recall"):
        first, each = Questions(model, tried, kind, marks), [Questions(model, p, kind, marks) for p in counted]
        for steps in (0, *marks):
            draws = [draws_of(kind, p.ledger, 128) for p in counted]
            spent = mean([sum(rivals.frozen_cost(shape, next(d)) for _ in range(steps)) for d in draws])
            lines.append([f"{kind}, {steps} x 128", "", f"{spent / 1e9:.1f}", "",
                          *spread([q.found[steps] for q in each])])
        for label, own_alone in ((f"{REFINED_ROWS} rows", False), ("its own rows alone", True)):
            found = {rate: first.refine(rate, own_alone)[0] for rate in rates}
            print(f"{kind}, {label}: {first.found} {found}", flush=True)
            rate = max(found, key=found.get)
            results = [q.refine(rate, own_alone) for q in each]
            lines.append([f"{kind}, {marks[0]} x 128, then {REFINED} steps a question, {label}", f"{rate:g}", "",
                          f"{mean([spent for _, spent in results]) / 1e9:.1f}", *spread([x for x, _ in results])])
    print()
    table([f"{tokens} tokens, shared rate {RATE:g}", "rate", "GFLOP shared", "GFLOP a question", "found, %",
           "lowest to highest"], lines)


def spread(values):
    return percent(values), f"{min(values):.1f} to {max(values):.1f}"


QUESTIONS = {f.__name__: f for f in (spans, steps, transfer, delta, keys, mass, refine)}


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
