"""What requests take. The keys are the fields of refocus.v1; what is left out has the server's default."""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, TypeAlias, TypedDict

from refocus.v1 import context_pb2, inference_pb2

# Text, UTF-8 bytes, token ids, or a message with further fields.
Prompt: TypeAlias = str | bytes | Sequence[int] | inference_pb2.Prompt
# A text itself, UTF-8 bytes, token ids; a path or an open binary file is read in pieces.
Source: TypeAlias = str | bytes | Sequence[int] | os.PathLike[str] | BinaryIO
# An adapter's file: its bytes, its path, or an open binary file.
AdapterSource: TypeAlias = bytes | str | os.PathLike[str] | BinaryIO
# A question that closes the turn which a context's prologue opened: its text, as chat() takes it, or chat's own result.
Question: TypeAlias = str | bytes | inference_pb2.Chat
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
    recall_rows: context_pb2.AdaptContextRequest.RecallRows
    surprisal_spans: context_pb2.AdaptContextRequest.SurprisalSpans
    automatic: context_pb2.AdaptContextRequest.Automatic
    behind: int
    probe_every: int
    keep_best: bool
    patience: int
    validate_only: bool


class CreateOptions(TypedDict, total=False):
    request_id: str
    labels: dict[str, str]
    allow_special: bool
    no_bos: bool
    prologue: context_pb2.Prologue  # prologue()
    validate_only: bool


def _utf8(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def prologue(system: str | bytes | None = None, user: str | bytes = "", date: str = "") -> context_pb2.Prologue:
    """Begins a conversation about a text: the system prompt (None: the template's own, "": an empty one), then the user's
    turn with `user` and the text. date: for templates that tell the model the date."""
    message = context_pb2.Prologue(user=_utf8(user), date=date)
    if system is not None:
        message.system = _utf8(system)
    return message


def chat(question: str | bytes, earlier: Iterable[tuple[str | bytes, str | bytes]] = (), *,
         thinking: bool | None = None, thinking_budget: int | None = None, allow_special: bool = False,
         gap: str | bytes = "\n\n") -> inference_pb2.Chat:
    """A question in a conversation, and what was asked and answered before, oldest first: the server keeps none of it.

    thinking: whether the model reasons before it answers (None: as its template does); thinking_budget: tokens of reasoning
    at most, then it is ended. gap: stands between the text and the first question, in the same turn.
    """
    message = inference_pb2.Chat(allow_special=allow_special)
    if thinking is not None:
        message.thinking = thinking
    if thinking_budget is not None:
        message.thinking_budget = thinking_budget
    for asked, answered in earlier:
        message.earlier.add(question=_utf8(asked), answer=_utf8(answered))
    message.question = _utf8(question)
    if message.earlier:
        message.earlier[0].question = _utf8(gap) + message.earlier[0].question
    else:
        message.question = _utf8(gap) + message.question
    return message
