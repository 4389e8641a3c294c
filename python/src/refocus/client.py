"""The client for threads. One Client may be used by many threads; an AnswerStream by one."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from refocus import _calls, _transfers
from refocus._calls import OnProgress
from refocus.errors import RefocusError, UnavailableError, from_rpc
from refocus.options import (AdapterSource, AdaptOptions, CreateOptions, GenerateOptions, KeyRange, Prompt, Question,
                             Source)
from refocus.results import Adaptation, Answer, AttentionMass
from refocus.retry import Attempts, RetryPolicy
from refocus.v1 import cluster_pb2, context_pb2, inference_pb2

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.enable_retries", 0)]


class Client:
    """A connection to a service. Errors are RefocusError; calls are tried again as `retry` says.

    timeout: seconds of a whole call that computes or carries files (upload, prefill, adapt, generate, score, probe,
    export, import), retries included.
    read_timeout: of every other call.
    """

    def __init__(self, address: str = "127.0.0.1:7070", *, timeout: float | None = 3600.0, read_timeout: float = 20.0,
                 retry: RetryPolicy = RetryPolicy(), credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (grpc.insecure_channel(address, CHANNEL_OPTIONS) if credentials is None
                         else grpc.secure_channel(address, credentials, CHANNEL_OPTIONS))
        self._timeout = timeout
        self._read_timeout = read_timeout
        self._retry = retry

    def close(self) -> None:
        """Cancels what runs."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    # ---- The service.

    def cluster(self) -> cluster_pb2.GetClusterResponse:
        return self._read(_calls.GET_CLUSTER, cluster_pb2.GetClusterRequest())

    def model(self) -> cluster_pb2.Model:
        return self._read(_calls.GET_MODEL, cluster_pb2.GetModelRequest())

    def wait_until_serving(self, timeout: float = 60.0) -> None:
        """Until the group of workers is there; UnavailableError when it is not by then."""
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                if self.cluster().state == cluster_pb2.GetClusterResponse.SERVING:
                    return
                error = UnavailableError(f"no group of workers after {timeout} s", reason="GROUP_REBUILDING")
            except UnavailableError as refused:
                error = refused
            if attempts.remaining() == 0:
                raise error
            time.sleep(0.1)

    def tokenize(self, text: str | bytes, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Of at most 1 MiB; a longer text is counted by create(..., validate_only=True)."""
        data = text.encode() if isinstance(text, str) else text
        request = inference_pb2.TokenizeRequest(text=data, allow_special=allow_special, add_bos=add_bos)
        return list(self._read(_calls.TOKENIZE, request).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._read(_calls.DETOKENIZE, inference_pb2.DetokenizeRequest(ids=ids)).text

    # ---- Contexts.

    def create(self, source: Source, id: str = "", *, ttl: float | None = None, prefill: bool = True,
               on_progress: OnProgress = None, **options: Unpack[CreateOptions]) -> Context:
        """Uploads `source` in pieces and, unless told otherwise, computes its K and V.

        on_progress is called while the upload runs on a thread of gRPC's. When prefilling fails the upload is kept: the
        error has a note that names the context.
        """
        upload = _transfers.Upload(source, id, ttl, on_progress, options)
        context = Context(self, self._send(upload).name)
        if prefill and not options.get("validate_only"):
            try:
                context.prefill(on_progress=on_progress)
            except RefocusError as error:
                error.add_note(f"{context.name} was uploaded and kept; Client.context(...).prefill() goes on")
                raise
        return context

    def context(self, name: str) -> Context:
        """A context that is there already, by its name or id; nothing is asked of the server yet."""
        return Context(self, _calls.context_name(name))

    def contexts(self) -> list[context_pb2.Context]:
        """All of them, ordered by name."""
        found: list[context_pb2.Context] = []
        token = ""
        while True:
            page = self._read(_calls.LIST_CONTEXTS, context_pb2.ListContextsRequest(page_token=token))
            found += page.contexts
            token = page.next_page_token
            if not token:
                return found

    # ---- How calls run.

    def _read(self, method: _calls.Method[Request, Response], request: Request,
              again: Callable[[Request], object] = lambda request: None) -> Response:
        """`again` may change the request of a second attempt: the first one may have been carried out."""
        stub = self._channel.unary_unary(method.path, method.serialize, method.parse)
        attempts = Attempts(self._retry, self._read_timeout)
        while True:
            try:
                return stub(request, timeout=attempts.remaining())
            except grpc.RpcError as error:
                self._wait(attempts, error)
            again(request)

    def _send(self, call: _transfers.Sending[Request, Response]) -> Response:
        method = call.method
        stub = self._channel.stream_unary(method.path, method.serialize, method.parse)
        attempts = Attempts(self._retry, self._timeout)
        while True:
            try:
                running = stub.future(call.messages(), timeout=attempts.remaining())
                call.runs(running.cancel)
                return running.result()
            except grpc.RpcError as error:
                if call.failure is not None:
                    raise call.failure from None
                self._wait(attempts, error, call.repeatable)

    def _events(self, call: _calls.Call[Request, Response]) -> Generator[Response, None, None]:
        """What is new of each attempt. Closing the generator cancels the call."""
        method = call.method
        attempts = Attempts(self._retry, self._timeout)
        while True:
            requests = call.requests()
            if requests is not None:
                running = self._channel.stream_stream(method.path, method.serialize, method.parse)(
                    requests, timeout=attempts.remaining())
            else:
                running = self._channel.unary_stream(method.path, method.serialize, method.parse)(
                    call.request(), timeout=attempts.remaining())
            call.runs(running.cancel)
            try:
                for event in running:
                    if call.take(event):
                        attempts.moved()
                        yield event
                call.finish()
                return
            except grpc.RpcError as error:
                self._wait(attempts, error, call.repeatable)
            finally:
                running.cancel()

    def _wait(self, attempts: Attempts, error: grpc.RpcError, repeatable: bool = True) -> None:
        """Before the next attempt; raises when there is none."""
        failure = from_rpc(error)
        delay = attempts.delay_after(failure) if repeatable else None
        if delay is None:
            raise failure from None
        time.sleep(delay)

    def _drain(self, call: _calls.Call[Request, Response]) -> None:
        for _ in self._events(call):
            pass


class AnswerStream:
    """Iterates over the events of an answer as they come. Leaving the loop, or the `with` block, cancels it."""

    def __init__(self, events: Generator[inference_pb2.GenerateEvent, None, None], call: _calls.GenerateCall) -> None:
        self._events = events
        self._call = call

    def __iter__(self) -> Iterator[inference_pb2.GenerateEvent]:
        yield from self._events  # a loop that is left closes them with this generator

    def text(self) -> Iterator[str]:
        """The answer's text, piece by piece; whole characters only."""
        return (event.text for event in self if event.text)

    def answer(self) -> Answer:
        """Reads what is left and returns the whole; of several samples (`n`) the first."""
        return (self.answers())[0]

    def answers(self) -> list[Answer]:
        """Of all samples."""
        for _ in self:
            pass
        return self._call.answers()

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


class Context:
    """A text on the server. As a context manager it is deleted at the end of the block.

    `adapter` names the adapter whose queries answer; empty: the model's own.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.delete(force=True, allow_missing=True)

    def __repr__(self) -> str:
        return f"<refocus {self.name}>"

    def info(self) -> context_pb2.Context:
        """State, token count, adapters."""
        return self._client._read(_calls.GET_CONTEXT, context_pb2.GetContextRequest(name=self.name))

    def prefill(self, *, keep_going: bool = True, on_progress: OnProgress = None) -> context_pb2.PrefillEvent:
        """Computes K and V, or attaches to that work. keep_going: it goes on when this caller goes away."""
        call = _calls.PrefillCall(self.name, keep_going, on_progress)
        self._client._drain(call)
        return call.result()

    def adapt(self, adapter: str = "default", *, keep_going: bool = False, on_progress: OnProgress = None,
              **options: Unpack[AdaptOptions]) -> Adaptation:
        """Gradient steps on the queries; all or nothing. Not done twice when the connection breaks in between."""
        call = _calls.AdaptCall(self.name, adapter, keep_going, on_progress, options)
        self._client._drain(call)
        return call.result()

    def generate(self, prompt: Prompt = "", *, adapter: str = "", chat: Question | None = None,
                 **options: Unpack[GenerateOptions]) -> AnswerStream:
        """An answer as it comes; starts with the first event that is read. `chat`: a question in a conversation, of a
        context that was created with a prologue."""
        call = _calls.GenerateCall(self.name, prompt, adapter, chat, options)
        return AnswerStream(self._client._events(call), call)

    def ask(self, prompt: Prompt = "", *, adapter: str = "", chat: Question | None = None,
            **options: Unpack[GenerateOptions]) -> Answer:
        """A whole answer."""
        return self.generate(prompt, adapter=adapter, chat=chat, **options).answer()

    def score(self, targets: Iterable[Prompt], *, prompt: Prompt = "", adapter: str = "",
              chat: Question | None = None, token_logprobs: bool = False) -> list[inference_pb2.ScoreEvent]:
        """Log-probabilities of continuations, in order; with `chat`, of answers to that question."""
        call = _calls.ScoreCall(self.name, targets, prompt, adapter, chat, token_logprobs)
        if call.count:
            self._client._drain(call)
        return call.results

    def probe(self, ranges: Sequence[KeyRange], prompt: Prompt = "", *, adapter: str = "",
              positions: Sequence[int] = (), layers: Sequence[int] = (), heads: Sequence[int] = (),
              mean_over_heads: bool = False, mean_over_rows: bool = False) -> AttentionMass:
        """Shares of attention that rows (default: the prompt's tokens) give to ranges of the context."""
        call = _calls.ProbeCall(self.name, ranges, prompt, adapter, positions, layers, heads, mean_over_heads,
                                mean_over_rows)
        self._client._drain(call)
        return call.result()

    def delete(self, *, force: bool = False, allow_missing: bool = False) -> None:
        """Frees K/V and adapters. force: cancels what runs on it first."""
        request = context_pb2.DeleteContextRequest(name=self.name, force=force, allow_missing=allow_missing)
        self._client._read(_calls.DELETE_CONTEXT, request, _calls.allow_missing)

    def export_adapter(self, path: str | os.PathLike[str], adapter: str = "default", *,
                       on_progress: OnProgress = None) -> None:
        """Writes an adapter's file; it gets its name when it is whole and its checksum was right."""
        call = _transfers.ExportCall(self.name, adapter, on_progress)
        with _transfers.whole_file(path) as call.out:
            self._client._drain(call)

    def adapter_bytes(self, adapter: str = "default", *, on_progress: OnProgress = None) -> bytes:
        """An adapter's file in memory: 4 bytes for each of its numbers."""
        call = _transfers.ExportCall(self.name, adapter, on_progress)
        self._client._drain(call)
        return call.content()

    def import_adapter(self, source: AdapterSource, adapter: str = "", *, allow_other_model: bool = False,
                       on_progress: OnProgress = None) -> context_pb2.Adapter:
        """Makes the file's numbers the adapter's next revision, the first of a new one; nothing changes when they are
        not whole. adapter: the file's own name when empty. allow_other_model: only the shapes must fit. When the
        connection breaks at the very end it may be carried out twice: the same numbers, one revision more.
        """
        return self._client._send(_transfers.ImportCall(self.name, source, adapter, allow_other_model, on_progress))

    def delete_adapter(self, adapter: str) -> None:
        request = context_pb2.DeleteAdapterRequest(name=self.name, adapter_id=adapter)
        self._client._read(_calls.DELETE_ADAPTER, request)
