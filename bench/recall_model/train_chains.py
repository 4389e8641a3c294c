#!/usr/bin/env python3
"""Trains the chains model: as train.py does, on ledgers in which some accounts' values are other accounts, so that a
question can take several look-ups; it answers at once or thinks. bench/thinking.py compares.

    python3 bench/recall_model/train_chains.py OUT_FOLDER [--steps 4000]

A text is made of records, "; kamo nuve", and questions. Chains of four accounts end in a number: "; kamo nuve",
"; nuve lito", "; lito deva", "; deva 42", in any order and about three times each. A question asks for the end of a
chain from one of its accounts, over one to four look-ups: at once, "= kamo 42", or with thoughts, one look-up a token,
"> kamo nuve lito deva 42". Both stand between records behind the first part of each training text, no account twice in
the same mode. The loss counts what can be known, links stated before and ends whose links all were, and the rest a
little. Lengths and positions are train.py's, and so is softening, here of two layers.
"""
import random

import torch
import torch.nn.functional as F

import tokenizer as ledger
import train as base

HOPS = 4               # accounts of a chain
LAYERS = 4
SOFTENED = 2           # as train.py's; with one, questions at once learn two hops later
LENGTHS = ((64, 128), (128, 256, 256))  # as train.py's
RECORD, DIRECT, THOUGHT = (ledger.FIRST_BYTE + ord(mark) for mark in ";=>")
MARKS = (RECORD, DIRECT, THOUGHT)
REPEATS = 3            # records of an account in a text of records alone
MIX = (2, 3, 3)        # of records, direct questions and thoughts where questions stand
KINDS = ["record", "thought", *(f"direct {hops}" for hops in range(1, HOPS + 1))]  # of known tokens, from 1 on


def hops_of(account):
    """Look-ups from the account to the end of its chain; the value of account i is i - 1, or a number."""
    return account % HOPS + 1


def accounts_of(records, repeats=REPEATS):
    return HOPS * max(2, round(records / repeats / HOPS))


def draw_layout(tokens, draws):
    """Of a training text: [(mark, account or None)], which account a record is of being drawn later; and the number of
    accounts."""
    asked_from = draws.uniform(0.4, 0.85) * tokens
    accounts = accounts_of(asked_from / 3, draws.uniform(2, 4))
    left = {mark: draws.sample(range(accounts), accounts) for mark in (DIRECT, THOUGHT)}
    layout, length = [], 0
    while length < tokens:
        mark = RECORD if length < asked_from else draws.choices(MARKS, MIX)[0]
        account = left[mark].pop() if left.get(mark) else None
        layout.append((RECORD if account is None else mark, account))
        length += hops_of(account) + 2 if layout[-1][0] == THOUGHT else 3
    return layout, accounts


def columns_of(layout, accounts):
    """Where in the pool of draw_texts each token comes from, its kind if it can be known, and the columns of the
    records' values."""
    records = sum(mark == RECORD for mark, _ in layout)
    names, values, ends, drawn = (len(MARKS) + i * accounts for i in range(4))
    columns, kinds, stated = [], [], []
    for mark, account in layout:
        columns.append(MARKS.index(mark))
        if mark == RECORD:
            columns += [drawn + len(stated), drawn + records + len(stated)]
            stated.append(len(columns) - 1)
            kinds += [0, 0, 1]
        elif mark == DIRECT:
            columns += [names + account, ends + account]
            kinds += [0, 0, 2 + hops_of(account)]
        else:
            columns += [names + account, *(values + account - hop for hop in range(hops_of(account)))]
            kinds += [0, 0] + [2] * hops_of(account)
    return columns, kinds, stated


def draw_texts(batch, layout, accounts, generator, device):
    """ids [batch, tokens] and known [batch, tokens]: the kind of a token that follows from records before it, or 0."""
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    columns, kinds, stated = (torch.tensor(x, device=device) for x in columns_of(layout, accounts))
    names = ledger.FIRST_ACCOUNT + rand(batch, ledger.ACCOUNTS).argsort(1)[:, :accounts]
    numbers = ledger.FIRST_VALUE + (rand(batch, accounts // HOPS) * ledger.VALUES).long()
    values = names.roll(1, 1)
    values[:, ::HOPS] = numbers
    slots = (rand(batch, len(stated)) * accounts).long()
    marks = torch.tensor(MARKS, device=device).expand(batch, -1)
    pool = torch.cat((marks, names, values, numbers.repeat_interleave(HOPS, 1), names.gather(1, slots),
                      values.gather(1, slots)), 1)
    # The column from which on each of the pool is known: of a link its first record, of an end the last of its links'.
    never = torch.full_like(pool, len(columns))
    first = never[:, :accounts].scatter_reduce(1, slots, stated.expand(batch, -1), "amin")
    whole = first.view(batch, -1, HOPS).cummax(2).values.view(batch, -1)
    since = torch.cat((never[:, :len(MARKS) + accounts], first, whole, never[:, :len(stated)],
                       first.gather(1, slots)), 1)
    known = since[:, columns] < torch.arange(len(columns), device=device)
    return pool[:, columns], known * kinds


def draws_of(seed):
    """As draw_contexts. The texts of a batch have one layout."""
    draws = random.Random(seed)

    def draw(batch, tokens, generator, device):
        ids, known = draw_texts(batch, *draw_layout(tokens, draws), generator, device)
        return ids[:, :tokens], known[:, :tokens]

    return draw


def by_kind(found, known):
    return {name: base.percent(found[known == kind]) for kind, name in enumerate(KINDS, 1) if (known == kind).any()}


def asked(tokens, draws, most=3):
    """A layout of so many tokens of records and then, for each number of hops, at most `most` questions in each mode,
    few, since they lengthen the text; and the number of accounts."""
    records = tokens // 3
    accounts = accounts_of(records)
    questions = [(mark, HOPS * chain + hops) for mark in (DIRECT, THOUGHT) for hops in range(HOPS)
                 for chain in draws.sample(range(accounts // HOPS), min(most, accounts // HOPS))]
    return [(RECORD, None)] * records + draws.sample(questions, len(questions)), accounts


@torch.no_grad()
def answers(model, tokens, texts, seed, device):
    """Percent of right answers by mode and hops, of questions whose links all stand in the text. A thought is right if
    each of its tokens is, behind the right ones."""
    draws, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    right = {(mark, hops): [] for mark in (DIRECT, THOUGHT) for hops in range(1, HOPS + 1)}
    for _ in range(texts):
        layout, accounts = asked(tokens, draws)
        ids, known = draw_texts(1, layout, accounts, generator, device)
        hidden = model(ids, torch.arange(ids.shape[1], device=device)[None])[0]
        column = 3 * (tokens // 3)
        found = F.linear(hidden[column:-1], model.embed_tokens.weight).argmax(-1) == ids[0, column + 1:]
        found, known = found.tolist(), (known[0, column + 1:] > 0).tolist()
        at = 1  # of the row behind which the answer begins
        for mark, account in layout[tokens // 3:]:
            answer = slice(at, at + (hops_of(account) if mark == THOUGHT else 1))
            if all(known[answer]):
                right[mark, hops_of(account)].append(all(found[answer]))
            at = answer.stop + 2
    percent = lambda mark, hops: round(100 * sum(right[mark, hops]) / max(1, len(right[mark, hops])), 1)
    return {name: [percent(mark, hops) for hops in range(1, HOPS + 1)]
            for name, mark in (("direct", DIRECT), ("thinking", THOUGHT))}


def main():
    parser = base.arguments(__doc__.split("\n\n")[0], steps=4000, rate=1.5e-3,
                            lengths=[128, 256, 512, 1536, 3072, 6144, 12288])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--softened", type=int, default=SOFTENED, help="first layers whose attention is softened")
    options = parser.parse_args()
    config = base.CONFIG | {"num_hidden_layers": options.layers}
    device, model, facts = base.begin(config, options, options.softened)
    facts.update({"layers": options.layers, "softened": options.softened})
    facts.update(base.train(model, options, device, draws_of(options.seed), LENGTHS, by_kind))
    model.to(torch.bfloat16).float()  # as it is stored
    facts["answers"] = {n: answers(model, n, 24, options.seed + 1, device) for n in options.lengths}
    for tokens, found in facts["answers"].items():
        print(f"{tokens} tokens: right answers by hops, percent: {found}", flush=True)
    base.save(model, options.folder, facts, config)


if __name__ == "__main__":
    main()
