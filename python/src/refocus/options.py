"""What requests take. The keys are the fields of refocus.v1; what is left out has the server's default."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO, TypeAlias, TypedDict

from refocus.v1 import context_pb2, inference_pb2

# Text, UTF-8 bytes, token ids, or a message with further fields.
Prompt: TypeAlias = str | bytes | Sequence[int] | inference_pb2.Prompt
# A text itself, UTF-8 bytes, token ids; a path or an open binary file is read in pieces.
Source: TypeAlias = str | bytes | Sequence[int] | os.PathLike[str] | BinaryIO
KeyRange: TypeAlias = tuple[int, int]  # [begin, end) in tokens of the context


class GenerateOptions(TypedDict, total=False):
    request_id: str
    max_tokens: int
    temperature: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    n: int
    prompt_logprobs: bool


class AdaptOptions(TypedDict, total=False):
    request_id: str
    steps: int
    span_tokens: int
    spans_per_step: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    beta1: float
    beta2: float
    epsilon: float
    seed: int
    explicit_spans: context_pb2.AdaptContextRequest.ExplicitSpans
    probe_spans: int
    max_probe_rise: float
    continue_adapter: bool
    base_adapter: str
    kind: context_pb2.AdapterKind
    lora_rank: int
    lora_alpha: float
    optimizer: context_pb2.Optimizer
    momentum: float
    schedule: context_pb2.Schedule
    warmup_steps: int
    max_seconds: float
    validate_only: bool


class CreateOptions(TypedDict, total=False):
    request_id: str
    labels: dict[str, str]
    allow_special: bool
    no_bos: bool
    prologue: context_pb2.Prologue
    validate_only: bool
