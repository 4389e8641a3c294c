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
from refocus.v1 import context_pb2

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
    steps: int = 32
    span: int = 128
    spans: int = 1             # a step
    learning_rate: float | None = None  # None: the server's default
    lora_rank: int = 0         # 0: a full delta
    lora_alpha: float | None = None
    decay: float | None = None
    budget: int = 8192         # tokens of thinking
    match: str = ""            # "flops", "time": the budget is found
    n: int = 8                 # samples
    temperature: float | None = None

    def adapt_options(self, seed: int) -> AdaptOptions:
        options: dict[str, Any] = {"steps": self.steps, "span_tokens": self.span, "spans_per_step": self.spans,
                                   "seed": seed, "kind": context_pb2.LORA if self.lora_rank else context_pb2.FULL}
        if self.learning_rate is not None:
            options["learning_rate"] = self.learning_rate
        if self.decay is not None:
            options["weight_decay"] = self.decay
        if self.lora_rank:
            options["lora_rank"] = self.lora_rank
            if self.lora_alpha is not None:
                options["lora_alpha"] = self.lora_alpha
        return cast(AdaptOptions, options)

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

    def cost(self, shape: flops.Shape, context: int) -> int:
        """Operations of its adaptation."""
        span = min(self.span, max(1, context - 1))
        return flops.adapt(shape, context, self.steps, span, self.spans, self.lora_rank)

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


def _match(text: str) -> str:
    """flops or time"""
    if text not in ("flops", "time"):
        raise ValueError
    return text


ADAPTING = {"steps": ("steps", _whole(1, 10000)), "span": ("span", _whole(1, 8192)), "spans": ("spans", _whole(1, 64)),
            "lr": ("learning_rate", _real(0, 1)), "decay": ("decay", _real(0, 1))}
LORA_SETTINGS = {"rank": ("lora_rank", _whole(1, 512)), "alpha": ("lora_alpha", _real(1e-3, 1e6))}
OF_WAY: dict[str, dict[str, tuple[str, Callable[[str], Any]]]] = {
    "": {},
    "thinking": {"budget": ("budget", _whole(1, 65536)), "match": ("match", _match),
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
    known: dict[str, tuple[str, Callable[[str], Any]]] = dict(OF_WAY[way])
    fields: dict[str, Any] = {"label": label, "name": name, "context": base != "no-context", "way": way}
    if base.startswith("qttt"):
        known |= ADAPTING
        fields["adapt"] = True
    if base == "qttt-lora":
        known |= LORA_SETTINGS
        fields["lora_rank"] = 16
    for setting in filter(None, settings.split(",")):
        key, _, text = setting.partition("=")
        if key not in known:
            raise EvalError(f"method {name}: got the setting {key!r}, allowed "
                            f"{', '.join(sorted(known)) or 'none'}")
        field, convert = known[key]
        try:
            fields[field] = convert(text)
        except ValueError:
            raise EvalError(f"method {name}: got {key}={text!r}, allowed {convert.__doc__}") from None
    return Method(**fields)


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
    """The adaptation whose cost others match: the first plain one."""
    return next((method for method in methods if method.name in ("qttt", "qttt-lora")), None)
