"""Associative recall: a ledger of accounts and what each of them holds.

In words for models with a tokenizer. As token ids for the small model that ships with Refocus: [account token, value
token] pairs, where accounts recur about four times and their account, the account of distractors, grows with length.
"""
from __future__ import annotations

import random

from refocus.evaluate.item import EvalError, Item, Question
from refocus.evaluate.judges import TOKENS
from refocus.evaluate.tasks import Settings, fit, generator, item, join, words

PREAMBLE = ("The ledger below says what each account holds. Answer the question after it with the one word that the "
            "ledger gives.\n\n")
RECURRENCES = 4  # of an account in a symbolic ledger, on average


def _lines(rng: random.Random, accounts: int) -> list[tuple[str, str, str]]:
    """Line, account, value. Accounts are words: small models hardly tell digits apart, each of which is a token."""
    return [(f"Account {account} holds {word}.", account, word)
            for account, word in ((account, rng.choice(words.NOUNS)) for account in words.pairs(rng, accounts))]


def recall(length: int, seed: int, settings: Settings) -> Item:
    def build(accounts: int) -> str:
        lines = _lines(generator("ledger", seed), accounts)
        return PREAMBLE + "\n".join(line for line, _, _ in lines)

    accounts = fit("ledger", build, settings.count, length, 2)
    lines = _lines(generator("ledger", seed), accounts)
    draft = join([(line, (account,)) for line, account, _ in lines])
    rng = generator("ledger", seed, "questions")
    asked = rng.sample(lines, min(settings.questions, accounts))
    ask = "\n\nQuestion: What does account {0} hold?\nAnswer: The ledger says: Account {0} holds"
    questions = [Question(account, ask.format(account), [word], "word", 16, draft.marks[account], ["\n"],
                          {"choices": words.NOUNS}) for _, account, word in asked]
    return item("ledger", length, seed, PREAMBLE, draft.text, questions)


def _pairs(task: str, rng: random.Random, tokens: int, settings: Settings) -> list[tuple[int, int]]:
    """Accounts with their values, in the order of a ledger of so many tokens."""
    low, high = settings.account_ids
    pairs = tokens // 2
    accounts = max(1, pairs // RECURRENCES)
    if pairs < 1 or accounts > high - low:
        raise EvalError(f"{task}: got a length of {tokens} tokens, allowed 2 to {(high - low) * RECURRENCES * 2 + 7} "
                        f"with {high - low} account ids")
    held = {account: rng.randrange(*settings.value_ids) for account in rng.sample(range(low, high), accounts)}
    return [(account, held[account]) for account in rng.choices(list(held), k=pairs)]


def symbolic(length: int, seed: int, settings: Settings) -> Item:
    """A length of n tokens is n / 2 pairs; questions are accounts that occurred, answered by one token."""
    rng = generator("symbols", seed, length)
    order = _pairs("symbols", rng, length, settings)
    held = dict(order)
    text = [token for pair in order for token in pair]
    places: dict[int, list[tuple[int, int]]] = {}
    for index, (account, _) in enumerate(order):
        places.setdefault(account, []).append((2 * index, 2 * index + 2))
    asked = rng.choices(list(places), k=settings.questions) if settings.questions > len(places) else \
        rng.sample(list(places), settings.questions)
    questions = [Question(f"{index}-{account}", [account], [held[account]], "token", 1, places[account])
                 for index, account in enumerate(asked)]
    return item("symbols", length, seed, "", text, questions)


def later(length: int, seed: int, settings: Settings) -> Item:
    """A ledger that goes on behind the text: every value there whose account the text has, each predicted from all that
    stands before it. The number of accounts grows with text and later tokens together, as where the recall model was
    trained and measured."""
    if settings.later < 2:
        raise EvalError(f"symbols-later: got {settings.later} later tokens, allowed at least 2")
    rng = generator("symbols-later", seed, length)
    order = _pairs("symbols-later", rng, length // 2 * 2 + settings.later, settings)
    before, behind = order[:length // 2], order[length // 2:]
    seen = {account for account, _ in before}
    found = [(2 * index + 1, value) for index, (account, value) in enumerate(behind) if account in seen]
    if not found:
        raise EvalError(f"symbols-later: got a length of {length} tokens, of which no account comes back in the next "
                        f"{settings.later}, allowed 64 or more")
    question = Question("later", [token for pair in behind for token in pair], [value for _, value in found], TOKENS, 1,
                        data={"rows": [row for row, _ in found]})
    return item("symbols-later", length, seed, "", [token for pair in before for token in pair], [question])
