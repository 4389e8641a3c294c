"""The transaction log of arXiv 2512.13898: transfers between accounts with exactly one anomaly of four kinds.

Balances go on from what was written, so that an anomaly shows where it is and nowhere else. A duplicate is inserted:
the same transaction is carried out again, and ids have no gap that would give it away. Two accounts keep every window
of the log readable by itself.
"""
from __future__ import annotations

import dataclasses
import random

from refocus.evaluate.item import Item, Question
from refocus.evaluate.tasks import Settings, fit, generator, item, join

KINDS = ("CALC_ERROR", "NEGATIVE_BAL", "LOST_UPDATE", "DUPLICATE_TXN")
PREAMBLE = """Below is the transaction log of a small bank. These rules hold for a correct log:
- the sum of all balances never changes;
- no balance is ever negative;
- each new balance is the old balance minus (sender) or plus (receiver) the amount;
- each old balance is the balance that the account had after its last transaction;
- each transaction is carried out once.
Exactly one transaction breaks a rule. Its kind is one of
CALC_ERROR: a new balance is not the old one with the amount taken away or added;
NEGATIVE_BAL: a balance falls below zero;
LOST_UPDATE: an old balance ignores the transaction before (stale value);
DUPLICATE_TXN: a transaction that had been carried out before is carried out again.

"""
PROMPT = """

Which transaction breaks a rule, and how? Answer with one JSON object, nothing else:
{"bug_type": "<kind>", "bug_location": "<TX id>"}
Answer:"""


@dataclasses.dataclass
class Transfer:
    id: str
    sender: str
    receiver: str
    amount: int
    sender_old: int
    sender_new: int
    receiver_old: int
    receiver_new: int

    def line(self) -> str:
        return (f"{self.id}: {self.sender} -> {self.receiver} {self.amount} | "
                f"{self.sender}: {self.sender_old} -> {self.sender_new} | "
                f"{self.receiver}: {self.receiver_old} -> {self.receiver_new}")


class _Bank:
    def __init__(self, rng: random.Random, accounts: int) -> None:
        self.rng = rng
        self.balance = {f"acct_{chr(ord('A') + i)}": rng.randrange(500, 1500) for i in range(accounts)}
        self.opening = dict(self.balance)
        self.log: list[Transfer] = []
        self.next_id = 1

    def transfer(self, sender: str = "", receiver: str = "", amount: int = 0, id: str = "",
                 stale: str = "", stale_value: int = 0) -> Transfer:
        if not sender:  # who owes pays nobody: the next transfer heals a negative balance
            owing = [name for name, balance in self.balance.items() if balance < 0]
            sender = self.rng.choice([name for name, balance in self.balance.items() if balance > 1])
            receiver = owing[0] if owing else self.rng.choice([name for name in self.balance if name != sender])
            least = max(1, -self.balance[receiver] + 1)
            amount = self.rng.randint(least, max(least, self.balance[sender] // 2))
        if not id:
            id = f"TX{self.next_id:04d}"
            self.next_id += 1
        old = {name: stale_value if name == stale else self.balance[name] for name in (sender, receiver)}
        made = Transfer(id, sender, receiver, amount, old[sender], old[sender] - amount, old[receiver],
                        old[receiver] + amount)
        self.balance[sender], self.balance[receiver] = made.sender_new, made.receiver_new
        self.log.append(made)
        return made


Log = tuple[dict[str, int], list[Transfer], list[int]]  # opening balances, transfers, lines of the anomaly


def simulate(seed: int, transfers: int, kind: str, accounts: int = 2) -> Log:
    """Opening balances, the log, and the lines of the anomaly: its own last, what it contradicts before it."""
    rng = generator("bank", seed, kind)
    depth = rng.random()
    at = min(transfers - 1, 2 + int(depth * (transfers - 2)))  # the anomaly's line
    bank = _Bank(rng, accounts)
    lines = [at]
    while len(bank.log) < transfers:
        if len(bank.log) != at:
            bank.transfer()
        elif kind == "CALC_ERROR":
            made = bank.transfer()
            wrong = rng.choice([made.sender, made.receiver])
            change = rng.choice([-1, 1]) * rng.randint(1, 60)
            if bank.balance[wrong] + change <= 0:
                change = abs(change)
            bank.balance[wrong] += change
            if wrong == made.sender:
                made.sender_new += change
            else:
                made.receiver_new += change
        elif kind == "NEGATIVE_BAL":
            sender, receiver = rng.sample(list(bank.balance), 2)
            bank.transfer(sender, receiver, bank.balance[sender] + rng.randint(1, 60))
        elif kind == "LOST_UPDATE":
            before = bank.log[-1]
            stale = rng.choice([before.sender, before.receiver])
            value = before.sender_old if stale == before.sender else before.receiver_old
            other = rng.choice([name for name in bank.balance if name != stale])
            sender, receiver = (stale, other) if rng.random() < 0.5 else (other, stale)
            limit = min(value if sender == stale else bank.balance[sender], 400)
            bank.transfer(sender, receiver, rng.randint(1, max(1, limit // 2)), stale=stale, stale_value=value)
            lines = [at - 1, at]
        else:
            back = [i for i in range(max(0, at - 6), at) if bank.balance[bank.log[i].sender] > bank.log[i].amount]
            first = rng.choice(back) if back else at - 1
            again = bank.log[first]
            bank.transfer(again.sender, again.receiver, again.amount, again.id)
            lines = [first, at]
    return bank.opening, bank.log, lines


def _draw(seed: int, transfers: int, kind: str) -> Log:
    """The first of the seed's logs in which nothing but the anomaly breaks a rule."""
    for attempt in range(1000):
        opening, log, lines = simulate(seed * 1000 + attempt, transfers, kind)
        if [(k, log[i].id) for k, i in broken(opening, log)] == [(kind, log[lines[-1]].id)]:
            return opening, log, lines
    raise AssertionError(f"no log of {transfers} transfers with {kind}")


def broken(opening: dict[str, int], log: list[Transfer]) -> list[tuple[str, int]]:
    """Rules that lines of a log break, found by reading it."""
    balance, seen, found = dict(opening), set(), []
    for index, line in enumerate(log):
        stale = (line.sender_old, line.receiver_old) != (balance[line.sender], balance[line.receiver])
        wrong = (line.sender_new != line.sender_old - line.amount
                 or line.receiver_new != line.receiver_old + line.amount)
        if line.id in seen:
            found.append(("DUPLICATE_TXN", index))
        if stale:
            found.append(("LOST_UPDATE", index))
        if wrong:
            found.append(("CALC_ERROR", index))
        if min(line.sender_new, line.receiver_new) < 0:
            found.append(("NEGATIVE_BAL", index))
        seen.add(line.id)
        balance[line.sender], balance[line.receiver] = line.sender_new, line.receiver_new
    return found


def _head(opening: dict[str, int]) -> str:
    return "Opening balances: " + ", ".join(f"{name} {amount}" for name, amount in opening.items())


def transaction_log(length: int, seed: int, settings: Settings) -> Item:
    """One anomaly, so one question; the kind goes round with the seed."""
    kind = KINDS[seed % len(KINDS)]

    def build(transfers: int) -> str:
        opening, log, _ = simulate(seed, transfers, kind)
        return PREAMBLE + _head(opening) + "\n" + "\n".join(line.line() for line in log)

    transfers = max(4, fit("bank", build, settings.count, int(length * 0.995), 4))
    opening, log, lines = _draw(seed, transfers, kind)
    rows: list[tuple[str, tuple[str, ...]]] = [(_head(opening), ())]
    rows += [(line.line(), ("bug",) if index in lines else ()) for index, line in enumerate(log)]
    draft = join(rows)
    question = Question(kind.lower(), PROMPT, [kind, log[lines[-1]].id], "bank", 48, draft.marks["bug"], ["}"],
                        {"transfers": transfers})
    return item("bank", length, seed, PREAMBLE, draft.text, [question])
