"""What calls return, where a message of the API alone would be unhandy."""
from __future__ import annotations

import array
import dataclasses

from refocus.v1 import context_pb2, inference_pb2


@dataclasses.dataclass(frozen=True)
class Progress:
    """Told to on_progress callbacks."""

    phase: str                  # "upload" (bytes or ids), "prefill" (tokens), "adapt" (steps),
                                # "export", "import" (bytes)
    done: int
    total: int                  # 0: not known
    rate: float = 0.0           # units a second, where the server says
    eta: float | None = None    # seconds
    loss: float | None = None   # of an adaptation step, nats per token


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    logprobs: list[inference_pb2.TokenLogprob]  # empty unless asked for
    reasoning: str                              # of models that think, in a chat
    prompt_logprobs: list[float]                # empty unless asked for; of the first sample
    summary: inference_pb2.GenerateSummary
    prompt_best: list[inference_pb2.TokenLogprob] = dataclasses.field(default_factory=list)  # beside prompt_logprobs


@dataclasses.dataclass(frozen=True)
class Adaptation:
    effective: context_pb2.AdaptEvent.Effective
    steps: list[context_pb2.AdaptEvent.Step]  # empty when the request had been done before
    probe_loss_before: float | None
    probe_loss_after: float | None
    adapter: context_pb2.Adapter              # empty with validate_only
    usage: context_pb2.PhaseUsage
    probes: list[context_pb2.AdaptEvent.Probe] = dataclasses.field(default_factory=list)  # between steps
    candidates: context_pb2.AdaptEvent.Candidates | None = None  # of surprisal_spans


@dataclasses.dataclass(frozen=True)
class AttentionMass:
    """Shares of attention, [layers, rows, ranges, heads]; rows and heads are one where the mean was asked for.

    With numpy: numpy.asarray(mass.values).reshape(mass.shape).
    """

    layers: list[int]
    positions: list[int]               # of the rows; empty: their mean
    ranges: list[tuple[int, int]]
    heads: list[int]                   # empty: their mean
    values: array.array[float]
    summary: inference_pb2.ProbeAttentionSummary

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.layers), max(1, len(self.positions)), len(self.ranges), max(1, len(self.heads)))

    def at(self, layer: int, row: int, key_range: int, head: int = 0) -> float:
        """By index into layers, positions, ranges and heads."""
        index = 0
        for value, size in zip((layer, row, key_range, head), self.shape):
            if not 0 <= value < size:
                raise IndexError(f"got {(layer, row, key_range, head)}, allowed below {self.shape}")
            index = index * size + value
        return self.values[index]
