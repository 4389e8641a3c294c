"""Facts in messy text: log lines, records, notes in several languages, errors as of a bad scan, broken encodings.

The facts asked for are written in the same mess; their codes alone are left as they are, so that an answer is exact.
"""
from __future__ import annotations

import random

from refocus.evaluate.item import Item, Question
from refocus.evaluate.tasks import Settings, fit, generator, item, join, words

PREAMBLE = ("The scanned pages below hold log lines and notes in several languages, with errors. Answer the question "
            "after them with the code that belongs to the parcel.\n\n")
SCAN = {"l": "1", "1": "l", "O": "0", "o": "0", "0": "O", "rn": "m", "m": "rn", "e": "c", "h": "li", "S": "5",
        "B": "8", "i": "\u0131", "cl": "d", "u": "ii", "fi": "\ufb01", " ": "  ", ".": ","}
NOTES = (
    "The parcel {parcel} was stored under {code}.",
    "Das Paket {parcel} liegt unter {code}.",
    "Le colis {parcel} est rangé sous {code}.",
    "El paquete {parcel} se guarda bajo {code}.",
    "Il pacco {parcel} si trova sotto {code}.",
    "Посылка {parcel} хранится под {code}.",
    "Το δέμα {parcel} βρίσκεται στο {code}.",
    "包裹{parcel}存放在{code}。",
)
FILLER = (
    "Der Wagen kam spät, niemand wusste warum.", "La réunion est reportée à mardi.", "No hay nada nuevo en el puerto.",
    "Сегодня ветер с севера.", "Η πόρτα έμεινε ανοιχτή.", "明天再检查一次。", "Tutto tranquillo sul molo.",
    "Nobody signed the second page.")
LEVELS = ("INFO", "WARN", "DEBUG", "ERROR", "notice")
SYSTEMS = ("scanner", "belt-3", "db", "gate", "cron", "printer")


def _scan(rng: random.Random, text: str, rate: float) -> str:
    """Errors of a bad scan and, rarely, of a wrong encoding."""
    out, at = [], 0
    while at < len(text):
        pair, letter = text[at:at + 2], text[at]
        hit = rng.random() < rate
        if hit and pair in SCAN:
            out.append(SCAN[pair])
            at += 2
            continue
        out.append(SCAN.get(letter, letter) if hit else letter)
        at += 1
    scanned = "".join(out)
    if rng.random() < 0.03:
        scanned = scanned.encode().decode("latin-1").replace("\x85", "?")
    return scanned


def _noise(rng: random.Random) -> str:
    stamp = f"2031-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}T{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    kind = rng.randrange(5)
    if kind == 0:
        line = f"{stamp} {rng.choice(LEVELS)} [{rng.choice(SYSTEMS)}] retry={rng.randint(0, 9)}"
    elif kind == 1:
        line = f'{{"ts":"{stamp}","sys":"{rng.choice(SYSTEMS)}","ok":{rng.choice(["true", "false", "nul"])},'
    elif kind == 2:
        line = rng.choice(FILLER)
    elif kind == 3:
        line = words.sentence(rng)
    else:
        line = f"| {rng.choice(words.NOUNS)} | {rng.randint(1, 999)} |  | {rng.choice(words.ADJECTIVES)} |"
    return _scan(rng, line, 0.04)


def _fact(rng: random.Random, parcel: str, code: str) -> str:
    before, _, rest = rng.choice(NOTES).partition("{parcel}")
    between, _, after = rest.partition("{code}")
    return _scan(rng, before, 0.04) + parcel + _scan(rng, between, 0.04) + code + _scan(rng, after, 0.04)


def _rows(seed: int, lines: int) -> tuple[list[tuple[str, tuple[str, ...]]], dict[str, str]]:
    """A third of the lines are facts."""
    rng = generator("noisy", seed)
    rows: list[tuple[str, tuple[str, ...]]] = []
    codes: dict[str, str] = {}
    for index in range(lines):
        if index % 3 == 1:
            parcel = f"P-{rng.randrange(100000, 1000000)}"
            while parcel in codes:
                parcel = f"P-{rng.randrange(100000, 1000000)}"
            codes[parcel] = "".join(rng.choices("ACDFHKMNPRTVWXY", k=2)) + f"-{rng.randrange(1000, 10000)}"
            rows.append((_fact(rng, parcel, codes[parcel]), (parcel,)))
        else:
            rows.append((_noise(rng), ()))
    return rows, codes


def messy(length: int, seed: int, settings: Settings) -> Item:
    def build(lines: int) -> str:
        return PREAMBLE + "\n".join(line for line, _ in _rows(seed, lines)[0])

    rows, codes = _rows(seed, fit("noisy", build, settings.count, length, 3))
    draft = join(rows)
    asked = generator("noisy", seed, "questions").sample(sorted(codes), min(settings.questions, len(codes)))
    questions = [
        Question(parcel, f"\n\nQuestion: Under which code is parcel {parcel} stored?\nAnswer: Parcel {parcel} is "
                 "stored under", [codes[parcel]], "word", 24, draft.marks[parcel], ["\n"])
        for parcel in asked]
    return item("noisy", length, seed, PREAMBLE, draft.text, questions)
