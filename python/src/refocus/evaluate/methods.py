"""How a question is answered: "qttt+thinking:steps=32,lr=1e-4,budget=512" is a name and settings.

Names are in-context, no-context, thinking, self-consistency, best-of-n, qttt, qttt-lora, and a qttt with one of the
three middle ones behind a plus. The thinking budget is a number of tokens, or `match=flops` (what the reference
adaptation costs in floating-point operations, by flops.py) or `match=time` (what it took in seconds, at the measured
rate of decoding).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from refocus.evaluate import flops
from refocus.evaluate.item import EvalError
from refocus.options import AdaptOptions, GenerateOptions
from refocus.results import Adaptation
from refocus.v1 import context_pb2

Request = context_pb2.AdaptContextRequest
WAYS = ("thinking", "self-consistency", "best-of-n")
NAMES = ("in-context", "no-context", *WAYS, "qttt", "qttt-lora",
         *(f"{q}+{way}" for q in ("qttt", "qttt-lora") for way in WAYS))

# How arXiv 2512.13898 decodes: thinking, and the rest where samples are drawn.
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


@dataclasses.dataclass(frozen=True)
class Method:
    label: str                 # as the user wrote it: names the method in journal and report
    name: str
    context: bool = True       # False: the floor, without the text
    adapt: bool = False
    way: str = ""              # one of WAYS; empty: one greedy answer
    request: dict[str, Any] = dataclasses.field(default_factory=dict)  # of an adaptation, fields of AdaptContextRequest
    budget: int = 8192         # tokens of thinking
    match: str = ""            # "flops", "time": the budget is found
    n: int = 8                 # samples
    temperature: float | None = None
    quoted: bool = False       # adapts to each question: to what the model quotes for it
    quote_tokens: int = 256    # at most
    cycle: int = 8             # spans that its steps go through: quoted ones, then uniform ones

    @property
    def lora_rank(self) -> int:
        """0: a full delta."""
        return int(self.request.get("lora_rank", 0))

    def adapt_options(self, seed: int) -> AdaptOptions:
        return cast(AdaptOptions, {**self.request, "seed": seed})

    def sampling(self, seed: int) -> GenerateOptions:
        """Of one draw; greedy where nothing is drawn."""
        if not self.way:
            return {}
        options: dict[str, Any] = {"seed": seed, **(THINKING_SAMPLING if self.way == "thinking" else SAMPLING)}
        if self.temperature is not None:
            options["temperature"] = self.temperature
            if self.temperature == 0:
                return {}
        return cast(GenerateOptions, options)

    def cost(self, shape: flops.Shape, context: int, done: Adaptation | None = None) -> int:
        """Operations of its adaptation, held-out rows that it probes included: as planned, or of one that is done, with
        the steps and probes that it made and the rows that it drew. Probes of trials count whole, where the server
        measures a part of what is held out."""
        request = self.request
        span = min(request["span_tokens"], max(1, context - 1))
        rows = span * request["spans_per_step"]
        probe_rows = span * request.get("probe_spans", 1 if "automatic" in request else PROBE_SPANS)
        steps, probes, keys = request["steps"], 2 + _probes_between(request), None
        trials = trial_probes = steps // 4 if "automatic" in request else 0
        candidates = self._candidates(context)
        behind = bool(request.get("behind"))
        if done is not None:
            steps = len(done.steps)
            probes = len(done.probes) + (done.probe_loss_before is not None) + (done.probe_loss_after is not None)
            trial_probes = sum(probe.trial for probe in done.probes)
            trials = max((probe.step for probe in done.probes if probe.trial), default=0)
            if done.candidates is not None:
                candidates = len(done.candidates.starts)
            if self.quoted or "automatic" in request:  # fewer where they meet explicit spans; as the service chose
                probe_rows = span * done.effective.probe_spans
            behind = bool(done.effective.behind)
            if done.effective.recall_rows:  # that may be fewer; an eighth of all, a seventh of these, is held out
                rows = min(rows, done.effective.recall_rows)
                probe_rows = min(probe_rows, max(1, done.effective.recall_rows // 7))
            starts = [start for step in done.steps for start in step.span_starts]
            if starts:  # of runs of rows, equally long on average
                keys = sum(starts) / len(starts) + (rows * steps / len(starts) + 1) / 2
        # Behind the text: all but trials and the first quarter of what is left.
        near = min(steps, trials + (request["steps"] - trials) // 4) if behind else steps
        return (flops.adapt(shape, context, near, rows, 1, self.lora_rank, keys)
                + flops.adapt(shape, context, steps - near, rows, 1, self.lora_rank, context, behind)
                + trial_probes * flops.probe(shape, context, probe_rows, self.lora_rank)
                + (probes - trial_probes) * flops.probe(shape, context, probe_rows, self.lora_rank, behind)
                + flops.probe(shape, context, candidates * span, self.lora_rank, behind))

    def _candidates(self, context: int) -> int:
        """Spans that are measured before the first step, as the server does it; at most, as probes take their place."""
        if "surprisal_spans" not in self.request:
            return 0
        fit = max(1, context // (self.request["span_tokens"] + 1))
        usual = 4 * self.request["steps"] * self.request["spans_per_step"]
        return int(min(self.request["surprisal_spans"].candidates or usual, fit, MAX_CANDIDATES))

    def most_tokens(self) -> int:
        """Of thinking, where that is known before the run."""
        return self.budget if self.way == "thinking" and not self.match else 0


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value
    convert.__doc__ = f"{low} to {high}"
    return convert


def _real(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError
        return value
    convert.__doc__ = f"{low:g} to {high:g}"
    return convert


def _one_of(**values: Any) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if text not in values:
            raise ValueError
        return values[text]
    convert.__doc__ = " or ".join(values)
    return convert


def _late_rows(text: str) -> dict[str, Any]:
    """0 to 0.999999, the share of the text before them"""
    return {"recall_rows": Request.RecallRows(after=_real(0, 0.999999)(text))}


def _of_surprisal(field: str, convert: Callable[[str], float]) -> Callable[[str], dict[str, Any]]:
    def message(text: str) -> dict[str, Any]:
        fields: dict[str, Any] = {field: convert(text)}
        return {"surprisal_spans": Request.SurprisalSpans(**fields)}
    message.__doc__ = convert.__doc__
    return message


MAX_CANDIDATES = 4096  # the server's limit
POLICIES = ("recall_rows", "surprisal_spans", "automatic")  # fields of the request, of which it has one

QUOTING = ("quote_tokens", "cycle")  # fields of Method

# A setting is a field of Method, or of AdaptContextRequest, and what makes its value of text; None: it stays unset; a
# dict: several fields.
Settings = dict[str, tuple[str, Callable[[str], Any]]]
ADAPTING: Settings = {
    "steps": ("steps", _whole(1, 10000)), "span": ("span_tokens", _whole(1, 8192)),
    "spans": ("spans_per_step", _whole(1, 64)), "lr": ("learning_rate", _real(0, 1)),
    "decay": ("weight_decay", _real(0, 1)), "clip": ("clip_norm", _real(1e-6, 1e6)),
    "rows": ("rows", _one_of(uniform={}, recall={"recall_rows": Request.RecallRows()},
                             surprisal={"surprisal_spans": Request.SurprisalSpans()},
                             auto={"automatic": Request.Automatic()}, quoted={"quoted": True})),
    "quote": ("quote_tokens", _whole(1, 4096)), "cycle": ("cycle", _whole(1, 64)),
    "after": ("rows", _late_rows),
    "candidates": ("rows", _of_surprisal("candidates", _whole(1, MAX_CANDIDATES))),
    "share": ("rows", _of_surprisal("share", _real(0, 1))), "skip": ("rows", _of_surprisal("skip", _real(0, 1))),
    "schedule": ("schedule", _one_of(constant=context_pb2.CONSTANT, linear=context_pb2.LINEAR,
                                     cosine=context_pb2.COSINE)),
    "warmup": ("warmup_steps", _whole(0, 9999)),
    "optimizer": ("optimizer", _one_of(adamw=context_pb2.ADAMW, sgd=context_pb2.SGD)),
    "momentum": ("momentum", _real(0, 0.9999999)),
    "keep": ("keep_best", _one_of(last=None, best=True)), "patience": ("patience", _whole(0, 10000)),
    "probe_every": ("probe_every", _whole(0, 10000)), "probe_spans": ("probe_spans", _whole(0, 16)),
    "behind": ("behind", _whole(0, 1 << 20)), "max_rise": ("max_probe_rise", _real(0, 1e6)),
}
LORA_SETTINGS: Settings = {"rank": ("lora_rank", _whole(1, 512)), "alpha": ("lora_alpha", _real(1e-3, 1e6))}
DEFAULTS = {"steps": 32, "span_tokens": 128, "spans_per_step": 1}
PROBE_SPANS = 2  # the server's default


def _probes_between(request: dict[str, Any]) -> int:
    """Probes behind some of the steps, as the server does it: at most, where it may end early."""
    automatic = "automatic" in request
    kept = request.get("keep_best") or automatic
    every = request.get("probe_every", max(1, request["steps"] // 8) if kept else 0)
    trials = request["steps"] // 4 if automatic else 0
    return trials + (int((request["steps"] - 1 - trials) // every) if every else 0)


OF_WAY: dict[str, Settings] = {
    "": {},
    "thinking": {"budget": ("budget", _whole(1, 65536)), "match": ("match", _one_of(flops="flops", time="time")),
                 "temperature": ("temperature", _real(0, 100))},
    "self-consistency": {"n": ("n", _whole(2, 64)), "temperature": ("temperature", _real(0.01, 100))},
    "best-of-n": {"n": ("n", _whole(2, 64)), "temperature": ("temperature", _real(0.01, 100))},
}


def parse(label: str) -> Method:
    name, _, settings = label.partition(":")
    if name not in NAMES:
        raise EvalError(f"got the method {name!r}, allowed {', '.join(NAMES)}")
    base, _, way = name.partition("+")
    if base in WAYS:
        base, way = "", base
    adapt = base.startswith("qttt")
    lora = base == "qttt-lora"
    adapting = (ADAPTING if adapt else {}) | (LORA_SETTINGS if lora else {})
    request: dict[str, Any] = {}
    if adapt:
        request = {**DEFAULTS, **({"kind": context_pb2.LORA, "lora_rank": 16} if lora else {"kind": context_pb2.FULL})}
    fields: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, text = setting.partition("=")
        if key not in adapting and key not in OF_WAY[way]:
            raise EvalError(f"method {name}: got the setting {key!r}, allowed "
                            f"{', '.join(sorted(adapting | OF_WAY[way])) or 'none'}")
        field, convert = (adapting | OF_WAY[way])[key]
        try:
            value = convert(text)
        except ValueError:
            raise EvalError(f"method {name}: got {key}={text!r}, allowed {convert.__doc__}") from None
        if isinstance(value, dict):
            for policy, message in value.items():
                if policy == "quoted":
                    fields[policy] = message
                else:
                    request.setdefault(policy, type(message)()).MergeFrom(message)
        elif value is not None:
            (request if key in adapting and field not in QUOTING else fields)[field] = value
    if sum(policy in request for policy in POLICIES) + any(name in fields for name in ("quoted", *QUOTING)) > 1 or (
            any(name in fields for name in QUOTING) and "quoted" not in fields):
        raise EvalError(f"method {label}: got settings of several rows, allowed those of one: after belongs to recall, "
                        "candidates, share and skip to surprisal, quote and cycle to quoted")
    return Method(label, name, base != "no-context", adapt, way, request, **fields)


def split(text: str) -> list[str]:
    """"a,b:x=1,y=2,c" is three methods: what has an equals sign and no colon belongs to the method before it."""
    labels: list[str] = []
    for part in filter(None, text.split(",")):
        if labels and "=" in part and ":" not in part:
            labels[-1] += "," + part
        else:
            labels.append(part)
    return labels


def parse_all(text: str) -> list[Method]:
    methods = [parse(label) for label in split(text)]
    labels = [method.label for method in methods]
    if not methods or len(set(labels)) != len(labels):
        raise EvalError(f"methods: got {text!r}, allowed one or more, each once")
    matched = next((method for method in methods if method.match), None)
    if matched is not None and reference(methods) is None:
        raise EvalError(f"method {matched.label}: got no adaptation to match, allowed beside a qttt without a plus")
    return methods


def reference(methods: list[Method]) -> Method | None:
    """The adaptation whose cost others match: the first plain one to a text."""
    return next((method for method in methods if method.name in ("qttt", "qttt-lora") and not method.quoted), None)
