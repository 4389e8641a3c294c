"""Multi-hop recall: who reports to whom, asked over two to four steps; every other chain is a distractor."""
from __future__ import annotations

from refocus.evaluate.item import Item, Question
from refocus.evaluate.tasks import Settings, fit, generator, item, join, shuffled, words

PREAMBLE = ("The notes below say who reports to whom. Answer the question after them with one name.\n\n")
HOPS = 4  # links of a chain


def _facts(seed: int, chains: int) -> list[list[str]]:
    rng = generator("hops", seed)
    people = words.names(rng, chains * (HOPS + 1))
    return [people[i:i + HOPS + 1] for i in range(0, len(people), HOPS + 1)]


def _rows(seed: int, chains: list[list[str]]) -> list[tuple[str, tuple[str, ...]]]:
    rows = [(f"{chain[i]} reports to {chain[i + 1]}.", (f"{number}/{i}",))
            for number, chain in enumerate(chains) for i in range(HOPS)]
    return shuffled(generator("hops", seed, "order"), rows)


def multi_hop(length: int, seed: int, settings: Settings) -> Item:
    def build(chains: int) -> str:
        return PREAMBLE + "\n".join(line for line, _ in _rows(seed, _facts(seed, chains)))

    chains = _facts(seed, fit("hops", build, settings.count, length, 1))
    draft = join(_rows(seed, chains))
    rng = generator("hops", seed, "questions")
    questions = []
    for index in range(settings.questions):
        number, hops = rng.randrange(len(chains)), 2 + index % (HOPS - 1)
        start = rng.randrange(HOPS - hops + 1)
        chain = chains[number]
        who = " of ".join(["the manager"] * hops)
        evidence = sorted(span for i in range(start, start + hops) for span in draft.marks[f"{number}/{i}"])
        questions.append(Question(
            f"{index}-{hops}", f"\n\nQuestion: Who is {who} of {chain[start]}?\nAnswer:", [chain[start + hops]], "word",
            16, evidence, ["\n"], {"hops": hops, "choices": [name for name in chain if name != chain[start]]}))
    return item("hops", length, seed, PREAMBLE, draft.text, questions)
