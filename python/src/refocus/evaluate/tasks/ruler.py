"""RULER's tasks that need no download (arXiv 2404.06654; prompts, sizes and counts as in github.com/NVIDIA/RULER,
scripts/data/synthetic and scripts/synthetic.yaml, Apache-2.0, Copyright 2024 NVIDIA CORPORATION).

The prompts are theirs, letter for letter; the generators are written anew, with these differences: running text is that
of --haystack (theirs: essays from the web), or made-up sentences; words are made up (theirs: the wonderwords package).
Length counts input and answer, as theirs does.
"""
from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable

from refocus.evaluate.item import EvalError, Item, Question
from refocus.evaluate.tasks import Draft, Settings, fit, generator, item, join, words

NIAH = """Some special magic {v} are hidden within the following text. Make sure to memorize it. I will quiz you \
about the {v} afterwards.\n{context}\nWhat are all the special magic {v} for {query} mentioned in the provided text?"""
NIAH_PREFIX = " The special magic {v} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VT = """Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: \
Find all variables that are assigned the value {query} in the text above."""
VT_PREFIX = (" Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
             "assigned the value {query}, they are: ")
CWE = """Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that \
appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"""
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE = """Read the following coded text and track the frequency of each coded word. Find the three most frequently \
appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the \
three most frequently appeared words in the above coded text?"""
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
DEPTHS = 40  # needles stand at some of so many evenly spaced depths

# haystack, kind of keys, kind of values, keys, values a key, queries
NIAH_TASKS = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}

Rows = list[tuple[str, tuple[str, ...]]]


def _token(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10 ** 6, 10 ** 7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return words.pairs(rng, 1)[0]


def _around(template: str, **fields: str) -> tuple[str, str]:
    """What stands before and after the context."""
    before, after = template.split("{context}")
    return before.format(**fields), after.format(**fields)


def _running(settings: Settings, size: int, rng: random.Random) -> list[str]:
    """Sentences, about `size` words in all; the text is repeated where it is too short."""
    if settings.haystack:
        flat = settings.haystack.split()
        return words.sentences(" ".join((flat * (size // len(flat) + 1))[:size]))
    found, total = [], 0
    while total < size:
        found.append(words.sentence(rng))
        total += found[-1].count(" ") + 1
    return found


def niah(task: str) -> Callable[[int, int, Settings], Item]:
    haystack, key_kind, value_kind, keys, values, queries = NIAH_TASKS[task]

    def draft(seed: int, size: int, settings: Settings) -> tuple[Draft, list[str], list[str]]:
        rng = generator(task, seed)
        chosen = [_token(rng, key_kind) for _ in range(keys)]
        held = {key: [_token(rng, value_kind) for _ in range(values)] for key in chosen}
        needles: Rows = [(NEEDLE.format(v=value_kind, key=key, value=value), (key,))
                         for key in chosen for value in held[key]]
        rng.shuffle(needles)
        asked = rng.sample(chosen, queries)
        answers = [value for key in asked for value in held[key]]
        if haystack == "essay":
            sentences = _running(settings, size, rng)
            depths = [round(100 * i / (DEPTHS - 1)) for i in range(DEPTHS)]
            places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(depths, len(needles)))
            rows: Rows = [(sentence, ()) for sentence in sentences]
            for place, needle in reversed(list(zip(places, needles))):
                rows.insert(place, needle)
            return join(rows, " "), asked, answers
        rows = [(NOISE if haystack == "noise" else
                 NEEDLE.format(v=value_kind, key=_token(rng, key_kind), value=_token(rng, value_kind)), ())
                for _ in range(size)]
        for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles):
            rows.insert(place, needle)
        return join(rows), asked, answers

    def make(length: int, seed: int, settings: Settings) -> Item:
        def parts(size: int) -> tuple[Draft, str, str, list[str], list[str]]:
            made, asked, answers = draft(seed, size, settings)
            query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
            template, kind = NIAH + NIAH_PREFIX, value_kind
            if queries * values == 1:
                template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
                kind = kind[:-1]
            before, after = _around(template, v=kind, query=query)
            return made, before, after, asked, answers

        def build(size: int) -> str:
            made, before, after, _, _ = parts(size)
            return before + made.text + after

        made, before, after, asked, answers = parts(fit(task, build, settings.count, length, 8, ANSWER_TOKENS["niah"]))
        evidence = sorted(span for key in asked for span in made.marks[key])
        return _single(task, length, seed, before, made.text, after, answers, ANSWER_TOKENS["niah"], evidence)

    return make


def _single(task: str, length: int, seed: int, before: str, text: str, after: str, answers: list[str], max_tokens: int,
            evidence: list[tuple[int, int]]) -> Item:
    return item(task, length, seed, before, text,
                [Question("0", after, answers, "ruler_all", max_tokens, evidence)])


def _chain(rng: random.Random, letters: int, hops: int, value: str) -> tuple[list[str], list[str]]:
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names, [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:])]


def variable_tracking(length: int, seed: int, settings: Settings, hops: int = 4) -> Item:
    """One chain of four assignments in noise, behind one worked example of about 500 tokens at most."""
    template = VT + VT_PREFIX

    def rows(rng: random.Random, size: int, chain: list[str]) -> Rows:
        made: Rows = [(NOISE, ()) for _ in range(size)]
        for offset, (place, link) in enumerate(zip(sorted(rng.sample(range(size), len(chain))), chain)):
            made.insert(place + offset, (link.strip() if link.endswith(" ") else link, ("chain",)))
        return made

    def parts(size: int) -> tuple[str, Draft, str, list[str]]:
        rng = generator("vt", seed)
        shown = str(rng.randrange(10000, 99999))
        names, chain = _chain(rng, 3, hops, shown)
        before, after = _around(template, query=shown, num_v=str(hops + 1))
        example = before + join(rows(rng, 5, chain)).text + after + " " + " ".join(names) + "\n\n"
        value = str(rng.randrange(10000, 99999))
        names, chain = _chain(rng, 5, hops, value)
        before, after = _around(template, query=value, num_v=str(hops + 1))
        return example + before, join(rows(rng, size, chain)), after, names

    def build(size: int) -> str:
        before, made, after, _ = parts(size)
        return before + made.text + after

    before, made, after, names = parts(fit("vt", build, settings.count, length, 5,
                                              ANSWER_TOKENS["vt"]))
    return _single("vt", length, seed, before, made.text, after, names, ANSWER_TOKENS["vt"], made.marks["chain"])


def common_words(length: int, seed: int, settings: Settings) -> Item:
    """Ten words that occur 30 times among others that occur 3 times (6 and 1 below 4096 tokens), after one example."""
    template = CWE + CWE_PREFIX
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    shown = (40, 10, 3) if length >= 4096 else (20, 3, 1)

    def listed(rng: random.Random, chosen: list[str], often: int, seldom: int) -> Draft:
        common = set(chosen[:10])
        all_words = chosen[:10] * often + chosen[10:] * seldom
        rng.shuffle(all_words)
        return join([(f"{i + 1}. {word}", ("common",) if word in common else ())
                     for i, word in enumerate(all_words)], " ")

    def parts(size: int) -> tuple[str, Draft, str, list[str]]:
        rng = generator("cwe", seed)
        taken: set[str] = set()
        example = words.distinct(rng, shown[0], 2, taken)
        before, after = _around(template)
        text = (before + listed(rng, example, shown[1], shown[2]).text + after + " "
                + " ".join(f"{i + 1}. {word}" for i, word in enumerate(example[:10])) + "\n")
        chosen = words.distinct(rng, size, 2, taken)
        return text + before, listed(rng, chosen, often, seldom), after, chosen[:10]

    def build(size: int) -> str:
        before, made, after, _ = parts(size)
        return before + made.text + after

    before, made, after, answers = parts(fit("cwe", build, settings.count, length, 11,
                                              ANSWER_TOKENS["cwe"]))
    return _single("cwe", length, seed, before, made.text, after, answers, ANSWER_TOKENS["cwe"], made.marks["common"])


def frequent_words(length: int, seed: int, settings: Settings, alpha: float = 2.0) -> Item:
    """Coded words whose counts follow a zeta law; the most frequent one is shown as dots and does not count."""
    budget = length - ANSWER_TOKENS["fwe"]
    vocabulary = max(5, budget // 50)
    before, after = _around(FWE + FWE_PREFIX)
    zeta = sum(k ** -alpha for k in range(1, 200_000)) + 200_000 ** (1 - alpha) / (alpha - 1)

    def parts(size: int) -> tuple[Draft, list[str]]:
        rng = generator("fwe", seed)
        coded: list[str] = []
        while len(coded) < vocabulary:
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            if word not in coded[-1000:]:
                coded.append(word)
        coded[0] = "..."
        rows: Rows = []
        for rank, word in enumerate(coded, 1):
            rows += [(word, ("top",) if 2 <= rank <= 4 else ())] * int(size * rank ** -alpha / zeta)
        rng.shuffle(rows)
        return join(rows, " "), coded[1:4]

    least = int(zeta * 4 ** alpha) + 1  # the third word occurs
    made, answers = parts(fit("fwe", lambda size: before + parts(size)[0].text + after, settings.count, length, least,
                              ANSWER_TOKENS["fwe"]))
    if len({made.text.split().count(answer) for answer in answers}) < 3:
        raise EvalError(f"fwe: got a length of {length} tokens, in which the three words are not told apart: raise "
                        "--lengths")
    return _single("fwe", length, seed, before, made.text, after, answers, ANSWER_TOKENS["fwe"], made.marks["top"])
