"""What happens inside while a question is asked: attention on the evidence, its rivals, the reference's likelihood."""
from __future__ import annotations

import math
import random
from typing import Any

from refocus.evaluate.item import Question
from refocus.evaluate.service import Opened, number

RANGES = 64          # of one ProbeAttention call
PROMPT_TOKENS = 1024  # likewise
EVIDENCE_KEYS = 32   # single keys of the evidence that are looked at
SAMPLED_KEYS = 224   # and of the rest of the context
DELTAS = (1.0, 2.0, 4.0)  # nats


def measures(opened: Opened, question: Question, adapter: str) -> dict[str, Any]:
    """Fields of an answer's record; empty where the evidence is not known or the question too long."""
    prompt, target = _ids(opened, question)
    if not question.evidence or not target or len(prompt) + len(target) > PROMPT_TOKENS:
        return {}
    evidence = opened.evidence(question)
    score = opened.context.score([target], prompt=prompt, adapter=adapter)[0]
    return {
        "target_nats": -score.sum_logprob / max(1, score.token_count),
        "evidence_tokens": sum(end - begin for begin, end in evidence),
        "attention": attention(opened, evidence, prompt, target, adapter),
        "rivals": rivals(opened, evidence, prompt, adapter),
    }


def _ids(opened: Opened, question: Question) -> tuple[list[int], list[int]]:
    """Tokens of the question, and of the first reference behind it."""
    if not isinstance(question.prompt, str):
        return question.prompt, [int(question.answers[0])]
    prompt = opened.client.tokenize(question.prompt)
    joined = opened.client.tokenize(f"{question.prompt.rstrip()} {question.answers[0]}")
    same = 0
    while same < min(len(prompt), len(joined)) and prompt[same] == joined[same]:
        same += 1
    return joined[:same], joined[same:]


def attention(opened: Opened, evidence: list[tuple[int, int]], prompt: list[int], target: list[int],
              adapter: str) -> dict[str, Any]:
    """Share of attention on the evidence by layer: mean over heads and over the rows that predict the reference's
    tokens. `even` is what it would be if those rows attended to every key alike."""
    first = opened.tokens + len(prompt) - 1
    rows = list(range(first, first + len(target)))
    mass: list[float] = []
    layers: list[int] = []
    for at in range(0, len(evidence), RANGES):
        part = opened.context.probe(evidence[at:at + RANGES], prompt + target, adapter=adapter, positions=rows,
                                    mean_over_heads=True, mean_over_rows=True)
        layers = part.layers
        sums = [sum(part.at(layer, 0, key_range) for key_range in range(len(part.ranges)))
                for layer in range(len(layers))]
        mass = [a + b for a, b in zip(mass, sums)] if mass else sums
    tokens = sum(end - begin for begin, end in evidence)
    even = sum(tokens / (row + 1) for row in rows) / len(rows)
    return {"layers": layers, "mass": [round(value, 6) for value in mass], "even": round(even, 6)}


def rivals(opened: Opened, evidence: list[tuple[int, int]], prompt: list[int], adapter: str) -> dict[str, Any]:
    """Distractor density: keys of the context whose attention logit is within so many nats of the best evidence key's,
    for the row that predicts the answer's first token. Shares of single keys give differences of logits exactly:
    log(share / share') = logit - logit'. Over a sample of the keys, scaled to all; mean over layers and heads, and the
    head that gives most to the evidence."""
    inside = [position for begin, end in evidence for position in range(begin, end)]
    keys = inside if len(inside) <= EVIDENCE_KEYS else \
        [inside[i * len(inside) // EVIDENCE_KEYS] for i in range(EVIDENCE_KEYS)]
    taken = set(inside)
    rest = [position for position in range(opened.tokens) if position not in taken]
    rng = random.Random(number("rivals", opened.item.id))
    sampled = sorted(rng.sample(rest, SAMPLED_KEYS)) if len(rest) > SAMPLED_KEYS else rest
    shares: dict[tuple[int, int], list[float]] = {}
    singles = keys + sampled
    for at in range(0, len(singles), RANGES):
        chunk = singles[at:at + RANGES]
        part = opened.context.probe([(key, key + 1) for key in chunk], prompt, adapter=adapter,
                                    positions=[opened.tokens + len(prompt) - 1])
        for layer in range(len(part.layers)):
            for head in range(len(part.heads)):
                shares.setdefault((part.layers[layer], part.heads[head]), []).extend(
                    part.at(layer, 0, index, head) for index in range(len(chunk)))
    scale = len(rest) / max(1, len(sampled))
    best = max(shares, key=lambda place: sum(shares[place][:len(keys)]))
    within = {place: [scale * count for count in counts(values[:len(keys)], values[len(keys):])]
              for place, values in shares.items()}
    return {"deltas": list(DELTAS), "sampled": len(sampled), "of": len(rest),
            "mean": [round(sum(row[i] for row in within.values()) / len(within), 2) for i in range(len(DELTAS))],
            "best_head": [round(value, 2) for value in within[best]], "best_head_is": list(best)}


def counts(evidence: list[float], others: list[float]) -> list[int]:
    """How many of `others` are within each of DELTAS of the largest of `evidence`; shares of attention."""
    top = max(evidence)
    return [sum(value > 0 and value >= top * math.exp(-delta) for value in others) for delta in DELTAS]
