"""Floating-point operations of prefill, decoding and adaptation, from a model's real shapes: for budgets at equal cost.

One multiply-accumulate is two operations. Per layer there are W_Q [hidden, q], W_K and W_V [hidden, kv], W_O [q,
hidden] with q = query heads x head size and kv = key heads x head size, and an MLP of three matrices [hidden, mlp]; the
head is [hidden, vocabulary]. A row that attends to p keys takes 4 q p in every layer (scores and weighted values).
Norms, RoPE, softmax and the optimizer's elementwise work are left out: below one percent.

arXiv 2512.13898 counts multiply-accumulates of a two-matrix MLP without grouped heads and without the causal half; its
formulas are paper_* below, for comparison.
"""
from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @property
    def query_size(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def linear(shape: Shape, keys: bool = True) -> int:
    """Of one row in the matrices of all layers, without attention and head. keys: with W_K and W_V."""
    projections = 2 * shape.hidden * shape.query_size + (2 * shape.hidden * shape.kv_size if keys else 0)
    return 2 * shape.layers * (projections + 3 * shape.hidden * shape.mlp)


def attention(shape: Shape, keys: int) -> int:
    """Of rows that attend to `keys` keys in all."""
    return 4 * shape.layers * shape.query_size * keys


def head(shape: Shape) -> int:
    return 2 * shape.hidden * shape.vocabulary


def prefill(shape: Shape, tokens: int) -> int:
    """Row i attends to i keys, its own included; the head is needed once."""
    return tokens * linear(shape) + attention(shape, tokens * (tokens + 1) // 2) + head(shape)


def decode(shape: Shape, context: int, tokens: int) -> int:
    """`tokens` further ones behind `context`, one by one."""
    keys = tokens * context + tokens * (tokens + 1) // 2
    return tokens * (linear(shape) + head(shape)) + attention(shape, keys)


def _delta(shape: Shape, lora_rank: int) -> int:
    """Of one row: x Delta beside W_Q, or x A B with LoRA."""
    return 2 * shape.layers * (lora_rank * (shape.hidden + shape.query_size) if lora_rank
                               else shape.hidden * shape.query_size)


def adapt_step(shape: Shape, context: int, span: int, spans: int = 1, lora_rank: int = 0,
               keys: float | None = None, behind: bool = False) -> int:
    """A step on `spans` spans of `span` rows, K and V read from the cache.

    Forward: W_Q, W_O, MLP, head, and the delta beside W_Q. Backward, activations only: the same matrices once more;
    attention's scores again, dP and dQ (three products where the forward pass has two); and the gradient of the delta
    itself. keys: that a row attends to on average; default half of the context, as with uniform starts. behind: rows are
    read again behind the context and make K and V of their own.
    """
    rows = span * spans
    through = linear(shape, keys=False) + head(shape)
    return (rows * (2 * through + 3 * _delta(shape, lora_rank) + _own_keys(shape, behind))
            + attention(shape, _keys(context, rows, keys)) * 5 // 2)


def _own_keys(shape: Shape, behind: bool) -> int:
    return linear(shape) - linear(shape, keys=False) if behind else 0


def _keys(context: int, rows: int, keys: float | None) -> int:
    return rows * (context + 1) // 2 if keys is None else round(rows * keys)


def adapt(shape: Shape, context: int, steps: int, span: int, spans: int = 1, lora_rank: int = 0,
          keys: float | None = None, behind: bool = False) -> int:
    return steps * adapt_step(shape, context, span, spans, lora_rank, keys, behind)


def probe(shape: Shape, context: int, rows: int, lora_rank: int = 0, behind: bool = False) -> int:
    """The loss of held-out rows, spread over the context or read again behind it: the forward half of a step."""
    through = linear(shape, keys=behind) + head(shape)
    return (rows * (through + _delta(shape, lora_rank))
            + attention(shape, _keys(context, rows, context if behind else None)))


def matched_tokens(shape: Shape, context: int, budget: int) -> int:
    """The most tokens that can be decoded behind `context` for `budget` operations; at least one."""
    low, high = 1, 2
    while decode(shape, context, high) <= budget:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if decode(shape, context, middle) <= budget:
            low = middle
        else:
            high = middle
    return low


# ---- As printed in the paper (section 4), in multiply-accumulates; r is the ratio of MLP to hidden size.

def paper_thinking(layers: int, hidden: int, r: float, context: int, tokens: int) -> float:
    quadratic, linear = 2 * layers * hidden, (4 + 2 * r) * layers * hidden ** 2
    return quadratic * (tokens * context + tokens * (tokens - 1) / 2) + linear * tokens


def paper_steps(layers: int, hidden: int, r: float, context: int, steps: int, span: int) -> float:
    return steps * 2 * (2 * layers * hidden * span * context + (2 + 2 * r) * layers * span * hidden ** 2)
