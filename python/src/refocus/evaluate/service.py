"""One text opened at a running service, and questions about it, each answered by a method."""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import time
from typing import Any

import refocus
from refocus.evaluate import flops, judges, quotes, spans
from refocus.evaluate.item import EvalError, Item, Question
from refocus.evaluate.methods import Method
from refocus.v1 import context_pb2

SCRATCHPAD = '\nThink step by step in a scratchpad. Then write "Final:" and the answer alone.\nScratchpad:'
FINAL = "Final:"
RATE_TOKENS = 33  # generated to measure the rate of decoding


def number(*parts: object) -> int:
    """A seed of 32 bits."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "little")


def shape_of(model: refocus.Model) -> flops.Shape:
    return flops.Shape(model.layers, model.hidden_size, model.query_heads, model.kv_heads, model.head_dim,
                       model.mlp_size, model.vocab_size)


@dataclasses.dataclass
class Reply:
    """An answer with what it took."""

    text: str                         # of a text; of token ids: numbers with blanks between
    samples: list[str]                # all of them, where several were drawn
    generated: int = 0                # tokens, of all samples, reasoning included
    reasoning: int = 0
    prompt: int = 0
    queue_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    seconds: float = 0.0              # from asking to the last token, here
    budget: int = 0                   # of thinking
    nats: float | None = None         # of the references, per token, where they were read along


@dataclasses.dataclass
class Quoted:
    """What the model named for a question, and the adaptation to that."""

    said: str
    quotes: int                       # lines of it
    found: int                        # in the text
    spans: int                        # that the steps go through, uniform ones included
    reply: Reply                      # its cost
    adaptation: refocus.Adaptation


class Opened:
    """A text at the service; a context manager that deletes it. floor: its instructions alone, without the text."""

    def __init__(self, client: refocus.Client, model: refocus.Model, item: Item, chat: bool,
                 floor: bool = False) -> None:
        self.item = item
        self.chat = chat
        self.floor = floor
        self.model = model
        self.client = client
        self._positions: spans.Tokens | None = None
        self._places: quotes.Places | None = None
        self.source: str | list[int]
        options: dict[str, Any] = {}
        if not isinstance(item.text, str):
            self.source = item.text[:1] if floor else item.text
        else:
            preamble = "" if floor and item.questions[0].floor else item.preamble
            if chat:
                options["prologue"] = refocus.Prologue(user=preamble.encode())
                self.source = "" if floor else item.text
            else:
                self.source = preamble + ("" if floor else item.text) or "\n"
        name = "eval-" + hashlib.sha256(f"{item.id}/{floor}".encode()).hexdigest()[:16]
        client.context(name).delete(force=True, allow_missing=True)  # of a run that was killed
        self.context = client.create(self.source, name, prefill=False, **options)
        try:
            self.prefill = self.context.prefill()
        except BaseException as error:
            self.__exit__(None, error)
            raise
        self.tokens = self.prefill.context.token_count

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        if not isinstance(error[1], refocus.UnavailableError):  # then it expires by itself
            self.close()

    def close(self) -> None:
        try:
            self.context.delete(force=True, allow_missing=True)
        except refocus.RefocusError:
            pass  # likewise; what went wrong before matters more

    # ---- Adapting.

    def adapt(self, method: Method, to: list[tuple[int, int]] | None = None) -> refocus.Adaptation:
        """to: starts and rows of spans; else the method's policy."""
        options = method.adapt_options(number("adapt", self.item.id))
        if to is not None:
            explicit = context_pb2.AdaptContextRequest.ExplicitSpans()
            for start, rows in to:
                explicit.spans.add(start=start, length=rows)
            options["explicit_spans"] = explicit
        adaptation = self.context.adapt("eval", **options)
        if method.lora_rank and adaptation.effective.kind != context_pb2.LORA:
            raise EvalError(f"method {method.label}: the service adapts full matrices only: update it")
        return adaptation

    def adapt_to_quotes(self, question: Question, method: Method) -> Quoted:
        """Of the base queries: what is quoted does not depend on the question before."""
        if not isinstance(self.item.text, str) or not isinstance(question.prompt, str):
            raise EvalError(no_words(method, self.item.id))
        answer = self.context.ask(**self._prompt(quotes.prompt(question.prompt)), max_tokens=method.quote_tokens)
        reply = Reply(answer.text, [])
        self._count(reply, answer)
        if self._places is None:
            self._places = quotes.Places(self.item.text)
        said = quotes.lines(answer.text)
        found = [place for place in map(self._places.find, said) if place is not None]
        to = quotes.spans(self.places(found), self.tokens, method.request["span_tokens"], method.cycle,
                          number("quoted", self.item.id, question.id))
        return Quoted(answer.text, len(said), len(found), len(to), reply, self.adapt(method, to))

    def decode_rate(self) -> float:
        """Tokens a second, by a short answer that nobody reads."""
        prompt: str | list[int] = "\n" if isinstance(self.item.text, str) else self.item.text[:1]
        summary = self.context.ask(prompt, max_tokens=RATE_TOKENS, ignore_eos=True).summary
        return max(1, summary.generated_tokens - 1) / max(1e-9, summary.decode_seconds)

    # ---- Asking.

    def ask(self, question: Question, method: Method, budget: int = 0) -> Reply:
        adapter = "eval" if method.adapt else ""
        if self.floor and question.floor:
            question = dataclasses.replace(question, prompt=question.floor)
        begin = time.monotonic()
        if question.judge == judges.TOKENS:
            reply = self._read_along(question, method, adapter)
        elif method.way == "thinking":
            reply = self._think(question, method, adapter, budget)
        else:
            reply = self._draw(question, method, adapter)
        reply.seconds = time.monotonic() - begin
        return reply

    def _seed(self, question: Question) -> int:
        return number("ask", self.item.id, question.id)  # the same for all methods

    def _prompt(self, text: str | list[int], thinking: bool | None = None, budget: int = 0) -> dict[str, Any]:
        if not self.chat or not isinstance(text, str):
            return {"prompt": text}
        chat = refocus.Chat(question=text.encode())
        if self.model.thinks:
            chat.thinking = bool(thinking)
            if thinking:
                chat.thinking_budget = budget
        return {"chat": chat}

    def _draw(self, question: Question, method: Method, adapter: str) -> Reply:
        options: dict[str, Any] = {"max_tokens": question.max_tokens, "stop": question.stop, **question.options,
                                   **method.sampling(self._seed(question))}
        if method.way:
            options |= {"n": method.n, "logprobs": 0}
        with self.context.generate(adapter=adapter, **self._prompt(question.prompt), **options) as stream:
            answers = stream.answers()
        texts = [self._text(answer, question) for answer in answers]
        chosen = 0
        if method.way == "self-consistency":
            said = [judges.normal(text, question.judge) for text in texts]
            votes = collections.Counter(filter(None, said))  # of equals, the one that was drawn first
            chosen = said.index(votes.most_common(1)[0][0]) if votes else 0
        elif method.way == "best-of-n":
            chosen = max(range(len(answers)), key=lambda i: likelihood(answers[i]))
        reply = Reply(texts[chosen], texts if method.way else [])
        for answer in answers:
            self._count(reply, answer, side_by_side=True)
        return reply

    def _read_along(self, question: Question, method: Method, adapter: str) -> Reply:
        """The most likely token in each reference's place, behind the right tokens before it: one pass over the prompt."""
        if method.way:
            raise EvalError(f"method {method.label}: got tokens to read along, allowed methods that draw nothing")
        answer = self.context.ask(question.prompt, adapter=adapter, max_tokens=1, ignore_eos=True, logprobs=1,
                                  prompt_logprobs=True)
        rows = question.data["rows"]
        if len(answer.prompt_best) != len(question.prompt):
            raise EvalError(f"{self.item.id}: the service does not say which token is most likely where: update it")
        reply = Reply(" ".join(str(answer.prompt_best[row].id) for row in rows), [],
                      nats=-sum(answer.prompt_logprobs[row] for row in rows) / len(rows))
        self._count(reply, answer)
        return reply

    def _think(self, question: Question, method: Method, adapter: str, budget: int) -> Reply:
        """Natively where the model does; else in a scratchpad, and in plain text the answer is asked for in a second
        request, so that the budget is kept to the token."""
        if not isinstance(question.prompt, str):
            raise EvalError(f"method {method.label}: got token ids, allowed a text")
        options: dict[str, Any] = dict(method.sampling(self._seed(question)))
        if self.chat and self.model.thinks:
            answer = self.context.ask(adapter=adapter, **self._prompt(question.prompt, True, budget), **options,
                                      max_tokens=min(65536, budget + question.max_tokens))
            reply = Reply(answer.text, [], budget=budget)
            self._count(reply, answer)
            return reply
        asked = (question.prompt.rpartition("\nAnswer:")[0] or question.prompt) + SCRATCHPAD
        if self.chat:
            answer = self.context.ask(adapter=adapter, **self._prompt(asked), **options,
                                      max_tokens=min(65536, budget + question.max_tokens))
            reply = Reply(answer.text.rpartition(FINAL)[2], [], budget=budget)
            self._count(reply, answer)
            return reply
        thoughts = self.context.ask(asked, adapter=adapter, max_tokens=budget, stop=[FINAL], **options)
        answer = self.context.ask(asked + thoughts.text.rstrip() + "\n" + FINAL, adapter=adapter,
                                  max_tokens=question.max_tokens, stop=question.stop, **options)
        reply = Reply(answer.text, [thoughts.text], budget=budget)
        self._count(reply, thoughts)
        reply.reasoning = reply.generated
        self._count(reply, answer)
        return reply

    @staticmethod
    def _text(answer: refocus.Answer, question: Question) -> str:
        return answer.text if isinstance(question.prompt, str) else " ".join(map(str, answer.token_ids))

    @staticmethod
    def _count(reply: Reply, answer: refocus.Answer, side_by_side: bool = False) -> None:
        summary = answer.summary
        reply.generated += summary.generated_tokens
        reply.reasoning += summary.reasoning_tokens
        reply.prompt = max(reply.prompt, summary.prompt_tokens)
        for field in ("queue_seconds", "prompt_seconds", "decode_seconds"):
            before, now = getattr(reply, field), getattr(summary, field)
            setattr(reply, field, max(before, now) if side_by_side else before + now)

    # ---- Where things stand.

    def evidence(self, question: Question) -> list[tuple[int, int]]:
        """In tokens of the context, merged where they touch."""
        return self.places(question.evidence)

    def places(self, stand: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The same of [begin, end) in characters of the text, or in its token ids."""
        if not isinstance(self.item.text, str):
            found = list(stand)
        else:
            assert isinstance(self.source, str)
            if self._positions is None:
                self._positions = spans.Tokens(self.source, self.client.tokenize)
            # What the tokenizer or the chat template puts in front; pieces may be tokenized a little differently.
            offset = self.tokens - self._positions.count
            moved = 0 if self.chat else len(self.item.preamble)
            found = [self._positions.span(begin + moved, end + moved) for begin, end in stand]
            found = [(min(max(0, begin + offset), self.tokens - 1), min(max(1, end + offset), self.tokens))
                     for begin, end in found]
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(found):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return merged


def no_words(method: Method, what: str) -> str:
    return f"method {method.label}: got token ids ({what}), allowed texts: a model quotes words"


def likelihood(answer: refocus.Answer) -> float:
    """Mean log-probability of its tokens, under the queries that drew it."""
    return sum(token.logprob for token in answer.logprobs) / max(1, len(answer.logprobs))
