"""Request bodies of the OpenAI interface, read field by field. What cannot be done is refused, not passed over."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from refocus.options import AdaptOptions, GenerateOptions

Json: TypeAlias = Mapping[str, Any]

# Mean something to other servers and nothing to the answer here.
_IGNORED = {"model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "stream_options",
            "add_special_tokens", "skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"}
_TEXT_ALONE = {"type": "text"}
_COMMON = {"max_tokens": int, "temperature": float, "top_p": float, "seed": int, "presence_penalty": float,
           "frequency_penalty": float, "n": int, "top_k": int, "min_p": float, "repetition_penalty": float,
           "min_tokens": int, "ignore_eos": bool}
_ADAPT = {"steps": int, "span_tokens": int, "spans_per_step": int, "learning_rate": float, "weight_decay": float,
          "clip_norm": float, "seed": int, "probe_spans": int, "lora_rank": int, "lora_alpha": float,
          "warmup_steps": int, "max_seconds": float}


class BodyError(Exception):
    """400: what, got, allowed."""

    def __init__(self, field: str, got: object, allowed: str) -> None:
        text = repr(got)
        super().__init__(f"{field}: got {text if len(text) <= 80 else text[:77] + '...'}, allowed {allowed}")
        self.field = field


@dataclasses.dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclasses.dataclass
class Question:
    """One answer to give, or n samples of it."""

    options: GenerateOptions
    adapt: AdaptOptions | None = None     # None: the model's own queries
    stream: bool = False
    stream_usage: bool = False
    # A completion: text or ids.
    prompts: Sequence[str | Sequence[int]] = ()
    echo: bool = False
    # A conversation.
    system: str | None = None
    earlier: Sequence[Turn] = ()
    question: str = ""
    thinking: bool | None = None


MOST_SAMPLES = 64
MOST_PROMPTS = 1024


def field_of(body: Json, name: str, kind: type, where: str = "") -> Any:
    """The value, or None where it is absent or null."""
    value = body.get(name)
    if value is None:
        return None
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "an object",
                 list: "an array"}
        raise BodyError(where + name, value, names[kind])
    if kind is int and not -1 << 63 <= value < 1 << 63:
        raise BodyError(where + name, value, "a number of 64 bits")
    if kind is str:
        check_text(where + name, value)
    return value


def check_text(name: str, text: str) -> str:
    """JSON can name halves of characters, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BodyError(name, text, "Unicode text, without half a surrogate pair") from None
    return text


def adapt_options(body: Json, where: str) -> AdaptOptions:
    options: dict[str, Any] = {}
    for name, value in body.items():
        if name not in _ADAPT:
            raise BodyError(where + name, value, "one of " + ", ".join(_ADAPT))
        options[name] = field_of(body, name, _ADAPT[name], where)
    return cast(AdaptOptions, options)


def _common(body: Json, allowed: set[str], default_temperature: float) -> Question:
    for name, value in body.items():
        if name not in allowed and name not in _IGNORED and name not in _COMMON and value is not None:
            raise BodyError(name, value, "nothing: this port does not have it")
    options = GenerateOptions()
    for name, kind in _COMMON.items():
        value = field_of(body, name, kind)
        if value is not None:
            options[name] = value  # type: ignore[literal-required]
    options.setdefault("temperature", default_temperature)
    if not 1 <= options.get("n", 1) <= MOST_SAMPLES:
        raise BodyError("n", options["n"], f"1 to {MOST_SAMPLES}")
    if options.get("seed", 0) < 0:
        raise BodyError("seed", options["seed"], "0 or more")
    stop = body.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
            raise BodyError("stop", stop, "a string or an array of strings")
        options["stop"] = [check_text("stop", text) for text in stops if text]
    ids = field_of(body, "stop_token_ids", list)
    if ids is not None:
        options["stop_token_ids"] = _ids("stop_token_ids", ids)
    bias = field_of(body, "logit_bias", dict)
    if bias:
        try:
            options["logit_bias"] = {int(token): float(value) for token, value in bias.items()}
        except (TypeError, ValueError, OverflowError):
            raise BodyError("logit_bias", bias, "token ids with numbers") from None
        _ids("logit_bias", list(options["logit_bias"]))
    question = Question(options, stream=bool(field_of(body, "stream", bool)))
    usage = field_of(body, "stream_options", dict) or {}
    question.stream_usage = bool(field_of(usage, "include_usage", bool, "stream_options."))
    own = field_of(body, "refocus", dict)
    if own is not None:
        for name, value in own.items():
            if name != "adapt":
                raise BodyError("refocus." + name, value, "adapt alone")
        settings = own.get("adapt")
        if settings is not None and not isinstance(settings, (dict, bool)):
            raise BodyError("refocus.adapt", settings, "an object of settings, true or false")
        if settings is not None and settings is not False:
            question.adapt = adapt_options({} if settings is True else settings, "refocus.adapt.")
    return question


def _ids(name: str, values: Sequence[Any]) -> list[int]:
    if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 1 << 32 for id in values):
        raise BodyError(name, values, "token ids")
    return list(values)


def completion(body: Json) -> Question:
    question = _common(body, {"prompt", "echo", "logprobs", "stop", "stop_token_ids", "logit_bias", "stream", "refocus",
                              "best_of", "suffix"}, 1.0)
    question.options.setdefault("max_tokens", 16)
    if body.get("suffix"):
        raise BodyError("suffix", body["suffix"], "none")
    best_of = field_of(body, "best_of", int)
    if best_of is not None and best_of != question.options.get("n", 1):
        raise BodyError("best_of", best_of, "the same as n")
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        question.prompts = [prompt]
    elif isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        question.prompts = prompt
    elif isinstance(prompt, list) and prompt and all(isinstance(one, list) for one in prompt):
        question.prompts = [_ids("prompt", one) for one in prompt]
    elif isinstance(prompt, list) and prompt:
        question.prompts = [_ids("prompt", prompt)]
    else:
        raise BodyError("prompt", prompt, "a string, an array of strings, of token ids, or of arrays of token ids")
    if len(question.prompts) > MOST_PROMPTS:
        raise BodyError("prompt", f"{len(question.prompts)} prompts", f"at most {MOST_PROMPTS}")
    for one in question.prompts:
        if isinstance(one, str):
            check_text("prompt", one)
        if not one:
            raise BodyError("prompt", one, "at least one token")
    question.echo = bool(field_of(body, "echo", bool))
    logprobs = field_of(body, "logprobs", int)
    if logprobs is not None:
        question.options["logprobs"] = logprobs
    if question.options["max_tokens"] == 0 and not question.echo:
        raise BodyError("max_tokens", 0, "1 or more, or 0 with echo")
    return question


def _text(name: str, content: Any) -> str:
    """A message's text: a string, or parts that are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return check_text(name, content)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" and
                                         isinstance(part.get("text"), str) for part in content):
        return check_text(name, "".join(part["text"] for part in content))
    raise BodyError(name, content, "a string, or an array of text parts")


def conversation(body: Json) -> Question:
    question = _common(body, {"messages", "logprobs", "top_logprobs", "max_completion_tokens", "stop", "stop_token_ids",
                              "logit_bias", "stream", "refocus", "response_format", "tools", "tool_choice",
                              "chat_template_kwargs"}, 1.0)
    limit = field_of(body, "max_completion_tokens", int)
    if limit is not None:
        question.options["max_tokens"] = limit
    if body.get("response_format") not in (None, _TEXT_ALONE):
        raise BodyError("response_format", body["response_format"], 'none, or {"type": "text"}')
    if body.get("tools"):
        raise BodyError("tools", body["tools"], "none")
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise BodyError("tool_choice", body["tool_choice"], '"none"')
    template = field_of(body, "chat_template_kwargs", dict) or {}
    for name, value in template.items():
        if name != "enable_thinking":
            raise BodyError("chat_template_kwargs." + name, value, "enable_thinking alone")
    question.thinking = field_of(template, "enable_thinking", bool, "chat_template_kwargs.")
    if field_of(body, "logprobs", bool):
        question.options["logprobs"] = field_of(body, "top_logprobs", int) or 0
    _read_messages(field_of(body, "messages", list) or [], question)
    return question


def _read_messages(messages: Sequence[Any], question: Question) -> None:
    turns: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BodyError(where, message, "an object with role and content")
        role, content = message.get("role"), _text(where + ".content", message.get("content"))
        if role in ("system", "developer") and index == 0:
            question.system = content
        elif role in ("user", "assistant") and (role == "user") == (len(turns) % 2 == 0):
            turns.append((role, content))
        else:
            raise BodyError(where + ".role", role, "system first, then user and assistant in turn")
    if len(turns) % 2 == 0:
        raise BodyError("messages", [turn[0] for turn in turns], "an array that ends with a user's message")
    texts = [text for _, text in turns]
    question.earlier = [Turn(*pair) for pair in zip(texts[0:-1:2], texts[1::2])]
    question.question = texts[-1]
