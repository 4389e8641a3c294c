"""Tasks x methods x lengths x seeds against a running service, with a journal that a later run goes on from."""
from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import refocus
from refocus.evaluate import flops, judges, measure, methods as ways, score
from refocus.evaluate.item import EvalError, Item, Question
from refocus.evaluate.journal import Journal
from refocus.evaluate.methods import Method
from refocus.evaluate.service import Opened, Quoted, Reply, no_words, shape_of

# K and V are gone: the text must be opened again.
LOST = ("CONTEXT_NOT_READY", "CONTEXT_NOT_FOUND", "WORKER_LOST", "GROUP_REBUILDING")
REOPEN = 3  # times a text is opened in all


@dataclasses.dataclass(frozen=True)
class Plan:
    items: list[Callable[[], Item]]        # made when their turn comes
    methods: list[Method]
    chat: bool = False
    measured: int = 2                      # questions of a text that are looked into, for each method
    parallel: int = 1                      # questions in flight


class Lost(Exception):
    """The service stands, but this text must be opened again."""


class Run:
    def __init__(self, client: refocus.Client, model: refocus.Model, plan: Plan, journal: Journal,
                 say: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True)) -> None:
        self._client = client
        self._model = model
        self._plan = plan
        self._journal = journal
        self._say = say
        self._units = len(plan.items) * len(plan.methods)
        self._finished = 0
        self._worked = 0.0
        self._told: set[str] = set()
        self._skipped = 0
        self.failures = 0

    def go(self) -> None:
        """All that is missing; UnavailableError when the service goes away, EvalError for what the user can mend."""
        for make in self._plan.items:
            item = make()
            missing = [method for method in self._plan.methods if self._missing(item, method)]
            done = len(self._plan.methods) - len(missing)
            self._finished += done
            self._skipped += done
            for attempt in range(REOPEN):
                try:
                    self._item(item, [method for method in missing if self._missing(item, method)])
                    break
                except Lost as lost:
                    if attempt == REOPEN - 1:
                        raise EvalError(f"{item.id}: its keys and values were lost {REOPEN} times: {lost}") from None
                    self._say(f"{item.id}: {lost}; opening it again")
                    self._client.wait_until_serving(120)

    def _missing(self, item: Item, method: Method) -> list[Question]:
        return [question for question in item.questions
                if (item.id, method.label, question.id) not in self._journal.done]

    def _item(self, item: Item, methods: list[Method]) -> None:
        chat = self._plan.chat and item.chat and not item.symbolic
        for floor in (False, True):
            chosen = sorted((m for m in methods if m.context != floor), key=lambda m: bool(m.match))
            if not chosen:
                continue
            try:
                with Opened(self._client, self._model, item, chat, floor) as opened:
                    for method in chosen:
                        self._method(opened, item, method)
            except refocus.RefocusError as error:
                if isinstance(error, refocus.UnavailableError) and error.reason not in LOST:
                    raise
                if error.reason in LOST:
                    raise Lost(str(error)) from None
                for method in chosen:
                    self._fail(item, method, str(error))

    def _method(self, opened: Opened, item: Item, method: Method) -> None:
        begin = time.monotonic()
        missing = self._missing(item, method)
        if not missing:
            return
        try:
            budget = self._budget(opened, item, method)
            looked = [question.id for question in item.questions[:self._plan.measured]]
            if method.quoted:
                self._quoted(opened, item, method, missing, budget, looked)
                return
            if method.adapt:
                self._adapt(opened, item, method)
            with concurrent.futures.ThreadPoolExecutor(self._plan.parallel) as pool:
                for record in pool.map(lambda q: self._ask(opened, item, method, q, budget, q.id in looked), missing):
                    self._journal.add(record)
        except (refocus.UnavailableError, refocus.NotFoundError):
            raise
        except refocus.RefocusError as error:
            if error.reason in LOST:
                raise
            self._fail(item, method, str(error))
            return
        self._done(item, method, begin)

    def _done(self, item: Item, method: Method, begin: float) -> None:
        self._finished += 1
        self._worked += time.monotonic() - begin
        self._progress(item, method)

    def _quoted(self, opened: Opened, item: Item, method: Method, missing: list[Question], budget: int,
                looked: list[str]) -> None:
        """One question after the other, each with queries of its own. What is refused to one stops no other."""
        begin, why = time.monotonic(), ""
        for question in missing:
            asked = time.monotonic()
            try:
                quoted = opened.adapt_to_quotes(question, method)
                wall = time.monotonic() - asked
                record = self._ask(opened, item, method, question, budget, question.id in looked)
            except refocus.RefocusError as error:
                gone = isinstance(error, (refocus.UnavailableError, refocus.NotFoundError)) or error.reason in LOST
                if gone:
                    raise
                why = str(error)
                continue
            self._journal.add(record | {"adapt": self._quotes(opened, method, quoted, wall)})
        if why:
            self._fail(item, method, why)
        else:
            self._done(item, method, begin)

    def _quotes(self, opened: Opened, method: Method, quoted: Quoted, wall: float) -> dict[str, Any]:
        """As of an adaptation to a text, what quoting took included."""
        reply = quoted.reply
        told = self._adapted(opened, method, quoted.adaptation, wall)
        asking = reply.prompt_seconds + reply.decode_seconds
        cost = flops.decode(shape_of(self._model), opened.tokens, reply.prompt + reply.generated)
        return {**told, "seconds": told["seconds"] + asking, "flops": told["flops"] + cost,
                "queue_seconds": told["queue_seconds"] + reply.queue_seconds, "said": quoted.said,
                "quotes": quoted.quotes, "found": quoted.found, "cycle": quoted.spans,
                "quote_tokens": reply.generated, "quote_seconds": asking}

    def _budget(self, opened: Opened, item: Item, method: Method) -> int:
        """Tokens of thinking."""
        if method.way != "thinking":
            return 0
        if not method.match:
            return method.budget
        reference = ways.reference(self._plan.methods)
        assert reference is not None
        adapted = self._journal.done.get((item.id, reference.label, ""))
        if method.match == "flops":
            shape = shape_of(self._model)
            cost = adapted["flops"] if adapted is not None else reference.cost(shape, opened.tokens)
            return flops.matched_tokens(shape, opened.tokens, cost)
        if adapted is None:
            raise EvalError(f"method {method.label}: {item.id} has no measured {reference.label} to match")
        return max(1, min(65536, round(float(adapted["seconds"]) * opened.decode_rate())))

    def _adapt(self, opened: Opened, item: Item, method: Method) -> None:
        begin = time.monotonic()
        adaptation = opened.adapt(method)
        self._journal.add(self._names("adapt", item, method)
                          | self._adapted(opened, method, adaptation, time.monotonic() - begin))

    def _adapted(self, opened: Opened, method: Method, adaptation: refocus.Adaptation, wall: float) -> dict[str, Any]:
        effective = adaptation.effective
        return {
            "context_tokens": opened.tokens,
            "steps": len(adaptation.steps), "span_tokens": effective.span_tokens, "spans": effective.spans_per_step,
            "learning_rate": effective.learning_rate, "seconds": adaptation.usage.seconds,
            "queue_seconds": adaptation.usage.queue_seconds, "wall_seconds": wall,
            "flops": method.cost(shape_of(self._model), opened.tokens, adaptation),
            "recall_rows": effective.recall_rows, **_candidates(adaptation),
            "probes": [[p.step, round(p.loss, 5)] for p in adaptation.probes],
            "first_loss": adaptation.adapter.first_loss, "last_loss": adaptation.adapter.last_loss,
            "losses": [round(step.loss, 5) for step in adaptation.steps],
            "probe_before": adaptation.probe_loss_before, "probe_after": adaptation.probe_loss_after,
            "delta_hash": adaptation.adapter.delta_hash}

    def _ask(self, opened: Opened, item: Item, method: Method, question: Question, budget: int,
             look: bool) -> dict[str, Any]:
        reply = opened.ask(question, method, budget)
        parts = judges.JUDGES[question.judge](reply.text, [str(a) for a in question.answers], question.data)
        record = {**self._names("answer", item, method), "question": question.id, "judge": question.judge,
                  "score": parts["score"], "parts": {k: v for k, v in parts.items() if k != "score"},
                  "answer": reply.text, "references": question.answers, **self._costs(opened, reply)}
        if reply.nats is not None:
            record["target_nats"] = reply.nats
        if reply.samples:
            record["samples"] = reply.samples
        if look and method.context and not method.way:
            record |= measure.measures(opened, question, "eval" if method.adapt else "")
        return record

    def _costs(self, opened: Opened, reply: Reply) -> dict[str, Any]:
        return {"tokens": {"context": opened.tokens, "prompt": reply.prompt, "generated": reply.generated,
                           "reasoning": reply.reasoning, "budget": reply.budget},
                "seconds": {"prefill": opened.prefill.usage.seconds, "queue": reply.queue_seconds,
                            "prompt": reply.prompt_seconds, "decode": reply.decode_seconds, "wall": reply.seconds},
                "flops": flops.decode(shape_of(self._model), opened.tokens, reply.prompt + reply.generated),
                "shared_tokens": opened.prefill.shared_tokens}

    @staticmethod
    def _names(kind: str, item: Item, method: Method) -> dict[str, Any]:
        return {"kind": kind, "item": item.id, "task": item.task, "length": item.length, "seed": item.seed,
                "method": method.label}

    def _fail(self, item: Item, method: Method, why: str) -> None:
        self._finished += 1
        self.failures += 1
        if why not in self._told:
            self._told.add(why)
            self._say(f"{item.id}, {method.label}: {why}")
        self._journal.add({**self._names("failure", item, method), "why": why})

    def _progress(self, item: Item, method: Method) -> None:
        scores = [value for question in item.questions
                  for value in score.scores(self._journal.done[item.id, method.label, question.id])]
        worked = self._finished - self._skipped
        left = self._worked / max(1, worked) * (self._units - self._finished)
        self._say(f"[{self._finished}/{self._units}] {item.id} {method.label}: {sum(scores):g} of {len(scores)}"
                  f"{f', about {left:.0f} s left' if left >= 1 else ''}")


def _candidates(adaptation: refocus.Adaptation) -> dict[str, Any]:
    """Spans that were measured, with what was chosen."""
    if adaptation.candidates is None:
        return {}
    losses = adaptation.candidates.losses
    chosen = [loss for loss, is_chosen in zip(losses, adaptation.candidates.chosen) if is_chosen]
    return {"candidates": len(losses), "candidates_chosen": len(chosen),
            "candidates_loss": round(sum(losses) / len(losses), 5), "chosen_loss": round(sum(chosen) / len(chosen), 5)}


def settle_chat(model: refocus.Model, wanted: str) -> bool:
    """--chat: "auto" where the model has a format."""
    if wanted == "on" and not model.chat_format:
        raise EvalError(f"--chat: got on, allowed off: {model.chat_refusal or 'the model has no chat format'}")
    return wanted == "on" or (wanted == "auto" and bool(model.chat_format))


def check(model: refocus.Model, tasks: list[str], lengths: list[int], methods: list[Method]) -> None:
    """What can be refused before anything is computed."""
    longest = max(lengths, default=0)
    thinking = max((method.most_tokens() for method in methods), default=0)
    if longest + thinking > model.max_positions:
        what = f"{longest} tokens" + (f" and {thinking} of thinking" if thinking else "")
        raise EvalError(f"got a text of {what}, allowed {model.max_positions} with question and answer (the window of "
                        f"{model.name}): lower --lengths or the budget, or serve with --rope-scaling")
    symbols = [task for task in tasks if task.startswith("symbols")]
    if symbols and (quoted := [method for method in methods if method.quoted]):
        raise EvalError(no_words(quoted[0], symbols[0]))
    if not model.has_tokenizer and (other := [task for task in tasks if not task.startswith("symbols")]):
        raise EvalError(f"got the task {other[0]} for a model without a tokenizer, allowed symbols, symbols-later")


def each(items: Iterator[Item]) -> list[Callable[[], Item]]:
    return [functools.partial(_itself, item) for item in items]


def _itself(item: Item) -> Item:
    return item
