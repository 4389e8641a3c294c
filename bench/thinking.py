#!/usr/bin/env python3
"""When does adapting beat thinking, and do both together beat either? Ledgers with chains, and a model that answers
questions about them at once or with thoughts, one look-up a token; docs/answers.md has the tables and what they mean.

    python3 bench/recall_model/train_chains.py OUT
    python3 bench/thinking.py --model OUT --device cuda --contexts 8

All begin with one prefill. Adapting is query-only training on the ledger's own text, records alone, by the pieces of
bench/rivals.py. Its budget, what 32 steps of 128 uniform rows cost, buys as many sampled thoughts of which the most
frequent answer counts: for one question, or its part where --questions of them share the steps. With both, half of the
budget goes into steps and half into thoughts. A question is read behind the ledger, apart from the others.
"""
import contextlib
import dataclasses
import random
import sys

import torch
from transformers import AttentionInterface

import answers
import rivals

sys.modules["train"] = rivals.ledgers  # train_chains.py imports it by this name
chains = rivals.load_module("recall_model_chains", rivals.ROOT / "bench/recall_model/train_chains.py")
tokens_of = rivals.ledgers.ledger  # the tokenizer's numbers

ROWS = {"uniform": rivals.SPAN, "recall": 64}  # of a step
TEMPERATURE = 0.7
MOST_THOUGHTS = 4096   # sampled for a question, whatever the budget
ALONE = 10             # questions of each number of hops that get the whole budget
MOST_SCORES = 1 << 28  # of one layer or of the head, held at once


@dataclasses.dataclass
class Ledger:
    tokens: int            # of the context: records alone
    ids: torch.Tensor      # [tokens]
    known: torch.Tensor    # rows whose next token is a value that stood there before
    questions: dict        # by hops: accounts' tokens [questions]
    numbers: dict          # by hops: the right answers' tokens [questions]


def draw_ledger(tokens, seed, hops, questions):
    """hops: numbers of look-ups to ask for; questions: of each at most, about accounts whose whole chain was stated."""
    records = tokens // 3
    layout = [(chains.RECORD, None)] * records
    generator = torch.Generator().manual_seed(seed)
    ids, known = chains.draw_texts(1, layout, chains.accounts_of(records), generator, "cpu")
    values = dict(zip(ids[0, 1::3].tolist(), ids[0, 2::3].tolist()))
    ends = {}
    for account in sorted(values):
        end, steps = account, 0
        while end in values:
            end, steps = values[end], steps + 1
        if end >= tokens_of.FIRST_VALUE:
            ends.setdefault(steps, []).append((account, end))
    drawn = {n: random.Random(seed + n).sample(ends.get(n, []), min(questions, len(ends.get(n, [])))) for n in hops}
    column = lambda i: {n: torch.tensor([pair[i] for pair in pairs], dtype=torch.long) for n, pairs in drawn.items()}
    device = torch.get_default_device()
    return Ledger(3 * records, ids[0].to(device), torch.nonzero(known[0, 1:])[:, 0].to(device), column(0), column(1))


# ---- Many short texts behind one

class Tails:
    """In the place of transformers' cache: K and V of many texts' own rows, by layer [texts, K/V heads, rows, d]."""

    def __init__(self, layers):
        self.kv = [None] * layers

    def update(self, keys, values, layer, *_, **__):
        if self.kv[layer] is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.kv[layer], (keys, values)))
        self.kv[layer] = keys, values
        return keys, values

    def repeat(self, times):
        self.kv = [tuple(x.repeat_interleave(times, 0) for x in pair) for pair in self.kv]


def attend_shared(module, query, key, value, attention_mask, scaling, shared, **_):
    """Rows of many texts attend to K/V that all share and to those of their own text up to themselves.
    query [texts, heads, rows, d]; key, value [texts, K/V heads, own, d]; shared: by layer (K, V), [1, K/V heads, limit,
    d]."""
    far_keys, far_values = (x[0] for x in shared[module.layer_idx])
    texts, heads, rows, d = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    grouped = (query * scaling).reshape(texts, kv_heads, -1, d)               # a K/V head's query heads, row by row
    flat = grouped.transpose(0, 1).reshape(kv_heads, -1, d)
    far = flat @ far_keys.transpose(1, 2)                                     # [K/V heads, texts x group x rows, limit]
    near = (grouped @ key.transpose(2, 3)).view(texts, kv_heads, -1, rows, own)
    near = near.masked_fill(~torch.ones(rows, own, dtype=torch.bool).tril(own - rows), float("-inf"))
    near = near.view(texts, kv_heads, -1, own)
    by_text = lambda x: x.view(kv_heads, texts, -1, x.shape[-1]).transpose(0, 1)
    top = torch.maximum(by_text(far.amax(-1, keepdim=True)), near.amax(-1, keepdim=True))
    far = far.sub_(top.transpose(0, 1).reshape(kv_heads, -1, 1)).exp_()
    near = (near - top).exp()
    total = by_text(far.sum(-1, keepdim=True)) + near.sum(-1, keepdim=True)
    out = (by_text(far @ far_values) + near @ value) / total
    return out.reshape(texts, heads, rows, d).transpose(1, 2), None


AttentionInterface.register("shared", attend_shared)


@contextlib.contextmanager
def sharing(model):
    model.set_attn_implementation("shared")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def logits_behind(model, ids, at, kv, tails):
    """What follows the last of ids [texts, rows], which stand `at` rows behind the context: [texts, vocabulary]."""
    rows = ids.shape[1]
    positions = kv[0][0].shape[2] + at + torch.arange(rows)
    nothing = torch.zeros(1, 1, 1, 1)  # a mask that transformers leaves as it is
    out = model.model(input_ids=ids, position_ids=positions[None], attention_mask=nothing, past_key_values=tails,
                      use_cache=False, shared=kv)
    return model.lm_head(out.last_hidden_state[:, -1])


def prompts(mark, accounts):
    return torch.stack((torch.full_like(accounts, mark), accounts), 1)


def answer_at_once(model, kv, accounts):
    with torch.no_grad(), sharing(model):
        tails = Tails(model.config.num_hidden_layers)
        return logits_behind(model, prompts(chains.DIRECT, accounts), 0, kv, tails).argmax(-1)


def think(model, kv, accounts, samples=1, temperature=0.0, seed=0):
    """Thoughts about each account: final tokens [accounts, samples], 0 where none is a number within as many tokens as
    the longest chain has; and the mean log-probability of a thought's tokens."""
    scores = max(model.config.num_attention_heads * kv[0][0].shape[2], model.config.vocab_size)
    at_once = max(1, MOST_SCORES // (samples * scores))
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    with torch.no_grad(), sharing(model):
        parts = [think_together(model, kv, part, samples, temperature, generator) for part in accounts.split(at_once)]
    return tuple(torch.cat(x) for x in zip(*parts))


def think_together(model, kv, accounts, samples, temperature, generator):
    tails = Tails(model.config.num_hidden_layers)
    logits = logits_behind(model, prompts(chains.THOUGHT, accounts), 0, kv, tails).repeat_interleave(samples, 0)
    tails.repeat(samples)
    ends = torch.zeros(len(logits), dtype=torch.long)
    sums, lengths, done = torch.zeros(len(logits)), torch.zeros(len(logits)), torch.zeros(len(logits), dtype=torch.bool)
    for step in range(chains.HOPS):
        token = drawn(logits, temperature, generator)
        sums += logits.log_softmax(-1).gather(1, token[:, None])[:, 0] * ~done
        lengths += ~done
        number = ~done & (token >= tokens_of.FIRST_VALUE)
        ends = torch.where(number, token, ends)
        done |= number
        if step + 1 == chains.HOPS or done.all():
            break
        logits = logits_behind(model, token[:, None], 2 + step, kv, tails)
    return ends.view(-1, samples), (sums / lengths).view(-1, samples)


def drawn(logits, temperature, generator):
    """The largest of logits / temperature + Gumbel noise is a draw from their softmax."""
    if not temperature:
        return logits.argmax(-1)
    noise = torch.rand(logits.shape, generator=generator).clamp_(1e-20, 1 - 1e-7).log_().neg_().log_()
    return (logits / temperature - noise).argmax(-1)


def most_frequent(ends, scores):
    """Of equally frequent answers the likelier. [accounts]; 0 where no thought ended."""
    votes = torch.where(ends > 0, 1 + 1e-6 * scores.double().exp(), 0.0)
    return torch.zeros(len(ends), tokens_of.VOCABULARY, dtype=torch.double).scatter_add_(1, ends, votes).argmax(-1)


def likeliest(ends, scores):
    best = scores.masked_fill(ends == 0, float("-inf")).argmax(-1, keepdim=True)
    return ends.gather(1, best)[:, 0]


# ---- What it costs

def thoughts_for(shape, tokens, hops, budget):
    """Right thoughts of so many hops whose rows the budget pays for. The question's two rows are read once: a single
    hop is answered in the second, and further thoughts cost nothing."""
    cost = rivals.flops.decode(shape, tokens + 2, hops - 1)
    return max(1, min(MOST_THOUGHTS, budget // cost)) if cost else MOST_THOUGHTS


def question_cost(shape, tokens, hops=1, thoughts=0):
    return (rivals.flops.decode(shape, tokens, 2) - rivals.flops.head(shape)
            + thoughts * rivals.flops.decode(shape, tokens + 2, hops - 1))


def adapt(model, ledger, kv, kind, rate, budget):
    """The deltas that the budget and half of it pay for."""
    shape, delta, half = rivals.shape_of(model.config), rivals.QueryDelta(model), rivals.QueryDelta(model)
    spent, at_half = 0, None

    def cost(rows):
        nonlocal spent, at_half
        one = rivals.frozen_cost(shape, rows)
        if at_half is None and spent + one > budget // 2:
            at_half = [w.detach().clone() for w in delta.weights]
        spent += one
        return one

    with delta.within():
        rivals.train(delta.parameters(), lambda rows: rivals.frozen_loss(model, ledger, kv, rows),
                     answers.draws_of(kind, ledger, ROWS[kind]), cost, rate, budget=budget)
    half.weights = at_half
    return delta, half


# ---- Who finds what

class Found:
    """Right answers of a method by hops, over ledgers."""

    def __init__(self):
        self.right, self.asked, self.costs = {}, {}, []

    def add(self, hops, found, right, cost):
        self.right[hops] = self.right.get(hops, 0) + (found == right).sum().item()
        self.asked[hops] = self.asked.get(hops, 0) + len(right)
        self.costs.append(cost)

    def percent(self, hops):
        return 100 * self.right[hops] / self.asked[hops] if self.asked.get(hops) else float("nan")


class Text:
    """A ledger and the K/V of its context, of which questions are asked. results: Found by method."""

    def __init__(self, model, tokens, seed, options, results):
        self.model, self.share, self.results = model, options.questions, results
        self.ledger = draw_ledger(tokens, seed, options.hops, options.questions)
        self.kv = rivals.prefill(model, self.ledger.ids)
        self.shape = rivals.shape_of(model.config)
        self.budget = rivals.budget_of(model, self.ledger)

    def note(self, method, hops, found, thoughts=0):
        right = self.ledger.numbers[hops][:len(found)]
        cost = question_cost(self.shape, self.ledger.tokens, hops, thoughts)
        self.results.setdefault(method, Found()).add(hops, found, right, cost)

    def ask(self, label):
        for hops, accounts in self.ledger.questions.items():
            self.note(f"{label}: at once", hops, answer_at_once(self.model, self.kv, accounts))
            self.note(f"{label}: thinking", hops, think(self.model, self.kv, accounts)[0][:, 0], 1)

    def vote(self, label, budget):
        """As many thoughts as a question's part of the budget pays for; then as all of it does, for few questions."""
        for hops, accounts in self.ledger.questions.items():
            shared = f"a {self.share}th", budget // self.share, len(accounts)
            for whose, paid, count in (shared, ("all", budget, ALONE)):
                thoughts = thoughts_for(self.shape, self.ledger.tokens, hops, paid)
                found = think(self.model, self.kv, accounts[:count], thoughts, TEMPERATURE, seed=hops)
                self.note(f"{label}: votes, {whose}", hops, most_frequent(*found), thoughts)
                self.note(f"{label}: likeliest, {whose}", hops, likeliest(*found), thoughts)

    def adapted(self, kind, rate):
        return adapt(self.model, self.ledger, self.kv, kind, rate, self.budget)


def best_rate(model, tokens, kind, options):
    """With the most right answers, at once and thinking, on a ledger that is not counted."""
    totals = {}
    for rate in options.rates:
        text = Text(model, tokens, 900, options, {})
        with text.adapted(kind, rate)[0].within():
            text.ask("")
        totals[rate] = sum(sum(found.right.values()) for found in text.results.values())
    print(f"{tokens}: {kind}: right answers by rate {totals}", file=sys.stderr, flush=True)
    return max(totals, key=totals.get)


def compare(model, tokens, options):
    """Found by method, over all ledgers; rates by kind of rows; the budget, which is the same for all of a length."""
    rates = {kind: best_rate(model, tokens, kind, options) for kind in options.kinds}
    results = {}
    for seed in range(1000, 1000 + options.contexts):
        text = Text(model, tokens, seed, options, results)
        text.ask("in-context")
        text.vote("in-context", text.budget)
        for kind in options.kinds:
            delta, half = text.adapted(kind, rates[kind])
            with delta.within():
                text.ask(f"qTTT {kind}")
            with half.within():
                text.vote(f"half qTTT {kind}", text.budget // 2)
    return results, rates, text.budget


def report(model, tokens, options, results, rates, budget):
    shape, lines = rivals.shape_of(model.config), []
    for name, found in results.items():
        steps = budget if name.startswith("qTTT") else budget / 2 if name.startswith("half") else 0
        lines.append([name, f"{steps / 1e9:.0f}" if steps else "", f"{answers.mean(found.costs) / 1e9:.2f}",
                      *(f"{found.percent(n):.1f}" for n in options.hops)])
    answers.table([f"{tokens} tokens; hops:", "steps, GFLOP", "a question, GFLOP", *options.hops], lines)
    bought = lambda part: "/".join(str(thoughts_for(shape, tokens, n, part)) for n in options.hops)
    asked = next(iter(results.values())).asked
    print(f"\nquestions by hops {asked}; rates {rates}; thoughts by hops, at most {MOST_THOUGHTS}, that a "
          f"{options.questions}th of the budget buys {bought(budget // options.questions)}, all of it {bought(budget)}")


def main():
    parser = rivals.arguments(__doc__)
    parser.set_defaults(model=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1536, 3072, 6144])
    parser.add_argument("--hops", type=int, nargs="+", default=[1, 2, 3, 4], choices=range(1, chains.HOPS + 1))
    parser.add_argument("--questions", type=int, default=50, help="of each number of hops; as many share a budget")
    parser.add_argument("--kinds", nargs="*", default=["uniform", "recall"], choices=ROWS, help="of rows to train on")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    options = parser.parse_args()
    if options.model is None:
        raise SystemExit("--model: got none; train one with bench/recall_model/train_chains.py OUT and give its folder")
    rivals.check_tokens(options.tokens, 2 * rivals.SPAN)
    rivals.prepare_torch(options)
    model = rivals.load_model(options.model)
    for tokens in options.tokens:
        started = rivals.now()
        report(model, tokens, options, *compare(model, tokens, options))
        print(f"{options.contexts} ledgers, {rivals.now() - started:.0f} s; {rivals.machine()}\n", flush=True)


if __name__ == "__main__":
    main()
