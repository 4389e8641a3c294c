"""From a question to the service's answers, and to the shapes that clients of the OpenAI interface expect."""
from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import refocus
from refocus.openai.bodies import Question
from refocus.openai.contexts import Contexts, Text
from refocus.options import GenerateOptions
from refocus.v1 import inference_pb2

Piece = inference_pb2.GenerateEvent
_FINISH = {inference_pb2.FINISH_EOS: "stop", inference_pb2.FINISH_STOP: "stop", inference_pb2.FINISH_LENGTH: "length"}
_TOKENIZE_BYTES = 1 << 20


def finish_reason(summary: inference_pb2.GenerateSummary) -> str:
    return _FINISH.get(summary.finish_reason, "stop")


class Port:
    """Answers questions of one service. Thread-safe.

    question_tokens: how much of a prompt's end is the question: what stands before it is the text that is opened, and
    adapted to. About four characters a token in conversations.
    """

    def __init__(self, client: refocus.Client, kept_contexts: int, question_tokens: int) -> None:
        self.client = client
        self.contexts = Contexts(client, kept_contexts)
        self.model = client.model()
        self._question_tokens = question_tokens
        self._spelling: dict[int, str] = {}

    # ---- What to ask.

    def tokenize(self, text: str, add_bos: bool) -> list[int]:
        """Of any length: cut at line ends where one call is not enough."""
        data = text.encode()
        ids: list[int] = []
        while len(data) > _TOKENIZE_BYTES:
            end = data.rfind(b"\n", 1, _TOKENIZE_BYTES) + 1 or data.rfind(b" ", 1, _TOKENIZE_BYTES) or _TOKENIZE_BYTES
            while end < len(data) and data[end] & 0xc0 == 0x80:
                end -= 1
            ids += self.client.tokenize(data[:end], allow_special=True, add_bos=add_bos and not ids)
            data = data[end:]
        return ids + self.client.tokenize(data, allow_special=True, add_bos=add_bos and not ids)

    def pieces(self, question: Question, prompt: int) -> Iterator[tuple[Piece, list[int], list[int]]]:
        """Events of an answer, with the ids of its text and of its prompt (completions)."""
        if not question.prompts:
            text, chat = self._conversation(question)
            with self.contexts.opened(text, question.adapt) as (context, adapter):
                with context.generate(chat=chat, adapter=adapter, **question.options) as stream:
                    for event in stream:
                        yield event, [], []
            return
        given = question.prompts[prompt]
        ids = self.tokenize(given, add_bos=True) if isinstance(given, str) else list(given)
        scored = question.echo and "logprobs" in question.options
        # All but the first token are scored where nothing is adapted to: then all belong to the question.
        own = len(ids) if scored and question.adapt is None else self._question_tokens
        cut = max(1, len(ids) - own)
        options: GenerateOptions = {**question.options}
        if scored:
            options["prompt_logprobs"] = True
        if options.get("max_tokens") == 0:
            options["max_tokens"] = 1
        with self.contexts.opened(Text(ids=tuple(ids[:cut])), question.adapt) as (context, adapter):
            with context.generate(ids[cut:], adapter=adapter, **options) as stream:
                for event in stream:
                    yield event, ids[:cut], ids[cut:]

    def _conversation(self, question: Question) -> tuple[Text, inference_pb2.Chat]:
        first = question.earlier[0].question if question.earlier else question.question
        cut = max(0, len(first) - 4 * self._question_tokens)
        line = first.find("\n", cut, cut + 2 * self._question_tokens) + 1
        head = first[:line or cut] if cut > 0 else ""
        rest = first[len(head):]
        earlier = [(turn.question, turn.answer) for turn in question.earlier]
        if earlier:
            earlier[0] = (rest, earlier[0][1])
        chat = refocus.chat(question.question if earlier else rest, earlier, thinking=question.thinking, gap="")
        return Text(system=question.system, user=head), chat

    def spelled(self, id: int) -> str:
        """A token alone."""
        found = self._spelling.get(id)
        if found is None:
            found = self._spelling[id] = self.client.detokenize([id])
        return found

    # ---- Shapes.

    def completion(self, question: Question) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        prompt_tokens = generated = 0
        count = question.options.get("n", 1)
        for prompt in range(len(question.prompts)):
            samples: list[list[Piece]] = [[] for _ in range(count)]
            text_ids: list[int] = []
            prompt_ids: list[int] = []
            for piece, text_ids, prompt_ids in self.pieces(question, prompt):
                samples[piece.sample].append(piece)
            prompt_tokens += len(text_ids) + len(prompt_ids)
            for sample, events in enumerate(samples):
                generated += events[-1].summary.generated_tokens
                choices.append(self._choice(question, prompt * count + sample, events, samples[0], text_ids, prompt_ids))
        return {**self.head("cmpl", "text_completion"), "choices": choices, "usage": usage(prompt_tokens, generated)}

    def _choice(self, question: Question, index: int, events: list[Piece], first: list[Piece], text_ids: list[int],
                prompt_ids: list[int]) -> dict[str, Any]:
        wanted = question.options.get("max_tokens") != 0
        text = "".join(event.text for event in events) if wanted else ""
        tokens = [one for event in events for one in event.logprobs] if wanted else []
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None,
                                  "finish_reason": finish_reason(events[-1].summary) if wanted else "length"}
        if question.echo:
            choice["text"] = self.client.detokenize(text_ids + prompt_ids) + text
        if "logprobs" not in question.options:
            return choice
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = 0

        def add(id: int, logprob: float | None, top: dict[str, float] | None) -> None:
            nonlocal offset
            spelled = self.spelled(id)
            for name, value in zip(columns, (spelled, logprob, top, offset)):
                columns[name].append(value)
            offset += len(spelled)

        if question.echo:
            for id in text_ids:
                add(id, None, None)
            scores = [score for event in first for score in event.prompt_logprobs]
            best = [score for event in first for score in event.prompt_best]
            for id, score, most in zip(prompt_ids, scores, best):
                top = {self.spelled(most.id): most.logprob}
                if id != most.id:
                    top[self.spelled(id)] = score
                add(id, score, top)
        for token in tokens:
            top = {self.spelled(other.id): other.logprob for other in token.top}
            add(token.id, token.logprob, top or {self.spelled(token.id): token.logprob})
        choice["logprobs"] = columns
        return choice

    def message(self, question: Question) -> dict[str, Any]:
        samples: list[list[Piece]] = [[] for _ in range(question.options.get("n", 1))]
        for piece, _, _ in self.pieces(question, 0):
            samples[piece.sample].append(piece)
        choices = []
        for index, events in enumerate(samples):
            message: dict[str, Any] = {"role": "assistant", "content": "".join(event.text for event in events)}
            reasoning = "".join(event.reasoning for event in events)
            if reasoning:
                message["reasoning_content"] = reasoning
            choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None,
                                      "finish_reason": finish_reason(events[-1].summary)}
            if "logprobs" in question.options:
                choice["logprobs"] = {"content": [self.chat_logprob(one) for event in events for one in event.logprobs]}
            choices.append(choice)
        return {**self.head("chatcmpl", "chat.completion"), "choices": choices,
                "usage": chat_usage([events[-1].summary for events in samples])}

    def chat_logprob(self, token: inference_pb2.TokenLogprob) -> dict[str, Any]:
        def one(entry: inference_pb2.TokenLogprob) -> dict[str, Any]:
            spelled = self.spelled(entry.id)
            return {"token": spelled, "logprob": entry.logprob, "bytes": list(spelled.encode())}
        return {**one(token), "top_logprobs": [one(other) for other in token.top]}

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
                "model": self.model.name}

    # ---- Streams: one dictionary a chunk.

    def stream(self, question: Question) -> Iterator[dict[str, Any]]:
        chat = not question.prompts
        head = self.head("chatcmpl", "chat.completion.chunk") if chat else self.head("cmpl", "text_completion")
        count = question.options.get("n", 1)
        summaries: list[inference_pb2.GenerateSummary] = []
        if chat:
            for index in range(count):
                yield {**head, "choices": [{"index": index, "delta": {"role": "assistant", "content": ""},
                                            "finish_reason": None}]}
        for prompt in range(max(1, len(question.prompts))):
            for piece, _, _ in self.pieces(question, prompt):
                ends = piece.HasField("summary")
                if ends:
                    summaries.append(piece.summary)
                if not (ends or piece.text or piece.reasoning or piece.logprobs):
                    continue
                choice: dict[str, Any] = {"index": prompt * count + piece.sample,
                                          "finish_reason": finish_reason(piece.summary) if ends else None}
                if chat:
                    choice["delta"] = {name: text for name, text in (("content", piece.text),
                                                                     ("reasoning_content", piece.reasoning)) if text}
                    if piece.logprobs:
                        choice["logprobs"] = {"content": [self.chat_logprob(one) for one in piece.logprobs]}
                else:
                    choice["text"] = piece.text
                yield {**head, "choices": [choice]}
        if question.stream_usage:
            yield {**head, "choices": [], "usage": chat_usage(summaries)}


def usage(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def chat_usage(summaries: list[inference_pb2.GenerateSummary]) -> dict[str, int]:
    prompt = summaries[0].context_tokens + summaries[0].prompt_tokens if summaries else 0
    return usage(prompt, sum(summary.generated_tokens for summary in summaries))
