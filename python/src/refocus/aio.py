"""The client for asyncio: as refocus.Client, with `await` and `async for`. Of one event loop."""
from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message

from refocus import _calls, _transfers, client
from refocus._calls import OnProgress, Stoppable
from refocus.client import CHANNEL_OPTIONS
from refocus.errors import RefocusError, UnavailableError, from_rpc
from refocus.options import (AdapterSource, AdaptOptions, CreateOptions, GenerateOptions, KeyRange, Prompt, Question,
                             Source)
from refocus.results import Adaptation, Answer, AttentionMass
from refocus.retry import Attempts, RetryPolicy
from refocus.v1 import cluster_pb2, context_pb2, inference_pb2

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")


def _in_loop(on_progress: OnProgress) -> OnProgress:
    """For calls that run on another thread."""
    if on_progress is None:
        return None
    told = on_progress
    loop = asyncio.get_running_loop()
    return lambda progress: loop.call_soon_threadsafe(told, progress)


class Client:
    """A connection to a service. Errors are RefocusError; calls are tried again as `retry` says.

    timeout: seconds of a whole call that computes or carries files (upload, prefill, adapt, generate, score, probe,
    export, import), retries included.
    read_timeout: of every other call.
    """

    def __init__(self, address: str = "127.0.0.1:7070", *, timeout: float | None = 3600.0, read_timeout: float = 20.0,
                 retry: RetryPolicy = RetryPolicy(), credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) if credentials is None
                         else grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS))
        self._threads = client.Client(address, timeout=timeout, read_timeout=read_timeout, retry=retry,
                                      credentials=credentials)  # it connects when it is first used
        self._timeout = timeout
        self._read_timeout = read_timeout
        self._retry = retry

    async def close(self) -> None:
        """Cancels what runs."""
        await self._channel.close()
        self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close()

    # ---- The service.

    async def cluster(self) -> cluster_pb2.GetClusterResponse:
        return await self._read(_calls.GET_CLUSTER, cluster_pb2.GetClusterRequest())

    async def model(self) -> cluster_pb2.Model:
        return await self._read(_calls.GET_MODEL, cluster_pb2.GetModelRequest())

    async def wait_until_serving(self, timeout: float = 60.0) -> None:
        """Until the group of workers is there; UnavailableError when it is not by then."""
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                if (await self.cluster()).state == cluster_pb2.GetClusterResponse.SERVING:
                    return
                error = UnavailableError(f"no group of workers after {timeout} s", reason="GROUP_REBUILDING")
            except UnavailableError as refused:
                error = refused
            if attempts.remaining() == 0:
                raise error
            await asyncio.sleep(0.1)

    async def tokenize(self, text: str | bytes, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Of at most 1 MiB; a longer text is counted by create(..., validate_only=True)."""
        data = text.encode() if isinstance(text, str) else text
        request = inference_pb2.TokenizeRequest(text=data, allow_special=allow_special, add_bos=add_bos)
        return list((await self._read(_calls.TOKENIZE, request)).ids)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return (await self._read(_calls.DETOKENIZE, inference_pb2.DetokenizeRequest(ids=ids))).text

    # ---- Contexts.

    async def create(self, source: Source, id: str = "", *, ttl: float | None = None, prefill: bool = True,
               on_progress: OnProgress = None, **options: Unpack[CreateOptions]) -> Context:
        """Uploads `source` in pieces and, unless told otherwise, computes its K and V.

        `source` is read on another thread. When prefilling fails the upload is kept: the error has a note that names the
        context.
        """
        upload = _transfers.Upload(source, id, ttl, _in_loop(on_progress), options)
        context = Context(self, (await self._in_thread(upload, lambda: self._threads._send(upload))).name)
        if prefill and not options.get("validate_only"):
            try:
                await context.prefill(on_progress=on_progress)
            except RefocusError as error:
                error.add_note(f"{context.name} was uploaded and kept; Client.context(...).prefill() goes on")
                raise
        return context

    def context(self, name: str) -> Context:
        """A context that is there already, by its name or id; nothing is asked of the server yet."""
        return Context(self, _calls.context_name(name))

    async def contexts(self) -> list[context_pb2.Context]:
        """All of them, ordered by name."""
        found: list[context_pb2.Context] = []
        token = ""
        while True:
            page = await self._read(_calls.LIST_CONTEXTS, context_pb2.ListContextsRequest(page_token=token))
            found += page.contexts
            token = page.next_page_token
            if not token:
                return found

    # ---- How calls run.

    async def _read(self, method: _calls.Method[Request, Response], request: Request,
              again: Callable[[Request], object] = lambda request: None) -> Response:
        """`again` may change the request of a second attempt: the first one may have been carried out."""
        stub = self._channel.unary_unary(method.path, method.serialize, method.parse)
        attempts = Attempts(self._retry, self._read_timeout)
        while True:
            try:
                return await stub(request, timeout=attempts.remaining())
            except grpc.aio.AioRpcError as error:
                await self._wait(attempts, error)
            again(request)

    async def _in_thread(self, call: Stoppable, run: Callable[[], Result]) -> Result:
        """For calls that write files, and those whose requests are a stream: gRPC for asyncio loses the status of one
        that the server ends while requests are still being written."""
        try:
            return await asyncio.to_thread(run)
        except asyncio.CancelledError:
            call.stop()
            raise

    async def _events(self, call: _calls.Call[Request, Response]) -> AsyncGenerator[Response, None]:
        """What is new of each attempt. Closing the generator cancels the call."""
        method = call.method
        attempts = Attempts(self._retry, self._timeout)
        while True:
            running = self._channel.unary_stream(method.path, method.serialize, method.parse)(
                call.request(), timeout=attempts.remaining())
            call.runs(running.cancel)
            try:
                async for event in running:
                    if call.take(event):
                        attempts.moved()
                        yield event
                call.finish()
                return
            except grpc.aio.AioRpcError as error:
                await self._wait(attempts, error, call.repeatable)
            finally:
                running.cancel()

    async def _wait(self, attempts: Attempts, error: grpc.aio.AioRpcError, repeatable: bool = True) -> None:
        """Before the next attempt; raises when there is none."""
        failure = from_rpc(error)
        delay = attempts.delay_after(failure) if repeatable else None
        if delay is None:
            raise failure from None
        await asyncio.sleep(delay)

    async def _drain(self, call: _calls.Call[Request, Response]) -> None:
        async for _ in self._events(call):
            pass


class AnswerStream:
    """Iterates over the events of an answer as they come. Leaving the loop, or the `async with` block, cancels it."""

    def __init__(self, events: AsyncGenerator[inference_pb2.GenerateEvent, None], call: _calls.GenerateCall) -> None:
        self._events = events
        self._call = call

    def __aiter__(self) -> AsyncIterator[inference_pb2.GenerateEvent]:
        return _Loop(self._events, self._call)

    async def text(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece; whole characters only."""
        async for event in self:
            if event.text:
                yield event.text

    async def answer(self) -> Answer:
        """Reads what is left and returns the whole; of several samples (`n`) the first."""
        return (await self.answers())[0]

    async def answers(self) -> list[Answer]:
        """Of all samples."""
        async for _ in self:
            pass
        return self._call.answers()

    async def close(self) -> None:
        self._call.cancel()
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close()


class _Loop(AsyncIterator[inference_pb2.GenerateEvent]):
    """One `async for`. Nothing tells an asynchronous iterator of a `break`, but that nobody holds it any more."""

    def __init__(self, events: AsyncGenerator[inference_pb2.GenerateEvent, None], call: _calls.GenerateCall) -> None:
        self._events = events
        self._call = call

    async def __anext__(self) -> inference_pb2.GenerateEvent:
        return await self._events.__anext__()

    def __del__(self) -> None:
        self._call.cancel()


class Context:
    """A text on the server. As a context manager it is deleted at the end of the block.

    `adapter` names the adapter whose queries answer; empty: the model's own.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.delete(force=True, allow_missing=True)

    def __repr__(self) -> str:
        return f"<refocus {self.name}>"

    async def info(self) -> context_pb2.Context:
        """State, token count, adapters."""
        return await self._client._read(_calls.GET_CONTEXT, context_pb2.GetContextRequest(name=self.name))

    async def prefill(self, *, keep_going: bool = True, on_progress: OnProgress = None) -> context_pb2.PrefillEvent:
        """Computes K and V, or attaches to that work. keep_going: it goes on when this caller goes away."""
        call = _calls.PrefillCall(self.name, keep_going, on_progress)
        await self._client._drain(call)
        return call.result()

    async def adapt(self, adapter: str = "default", *, keep_going: bool = False, on_progress: OnProgress = None,
              **options: Unpack[AdaptOptions]) -> Adaptation:
        """Gradient steps on the queries; all or nothing. Not done twice when the connection breaks in between."""
        call = _calls.AdaptCall(self.name, adapter, keep_going, on_progress, options)
        await self._client._drain(call)
        return call.result()

    def generate(self, prompt: Prompt = "", *, adapter: str = "", chat: Question | None = None,
                 **options: Unpack[GenerateOptions]) -> AnswerStream:
        """An answer as it comes; starts with the first event that is read. `chat`: a question in a conversation, of a
        context that was created with a prologue."""
        call = _calls.GenerateCall(self.name, prompt, adapter, chat, options)
        return AnswerStream(self._client._events(call), call)

    async def ask(self, prompt: Prompt = "", *, adapter: str = "", chat: Question | None = None,
            **options: Unpack[GenerateOptions]) -> Answer:
        """A whole answer."""
        return await self.generate(prompt, adapter=adapter, chat=chat, **options).answer()

    async def score(self, targets: Iterable[Prompt], *, prompt: Prompt = "", adapter: str = "",
              chat: Question | None = None, token_logprobs: bool = False) -> list[inference_pb2.ScoreEvent]:
        """Log-probabilities of continuations, in order; with `chat`, of answers to that question."""
        call = _calls.ScoreCall(self.name, targets, prompt, adapter, chat, token_logprobs)
        if call.count:
            await self._client._in_thread(call, lambda: self._client._threads._drain(call))
        return call.results

    async def probe(self, ranges: Sequence[KeyRange], prompt: Prompt = "", *, adapter: str = "",
              positions: Sequence[int] = (), layers: Sequence[int] = (), heads: Sequence[int] = (),
              mean_over_heads: bool = False, mean_over_rows: bool = False) -> AttentionMass:
        """Shares of attention that rows (default: the prompt's tokens) give to ranges of the context."""
        call = _calls.ProbeCall(self.name, ranges, prompt, adapter, positions, layers, heads, mean_over_heads,
                                mean_over_rows)
        await self._client._drain(call)
        return call.result()

    async def delete(self, *, force: bool = False, allow_missing: bool = False) -> None:
        """Frees K/V and adapters. force: cancels what runs on it first."""
        request = context_pb2.DeleteContextRequest(name=self.name, force=force, allow_missing=allow_missing)
        await self._client._read(_calls.DELETE_CONTEXT, request, _calls.allow_missing)

    async def export_adapter(self, path: str | os.PathLike[str], adapter: str = "default", *,
                       on_progress: OnProgress = None) -> None:
        """Writes an adapter's file; it gets its name when it is whole and its checksum was right."""
        call = _transfers.ExportCall(self.name, adapter, _in_loop(on_progress))

        def run() -> None:
            with _transfers.whole_file(path) as call.out:
                self._client._threads._drain(call)
        await self._client._in_thread(call, run)

    async def adapter_bytes(self, adapter: str = "default", *, on_progress: OnProgress = None) -> bytes:
        """An adapter's file in memory: 4 bytes for each of its numbers."""
        call = _transfers.ExportCall(self.name, adapter, on_progress)
        await self._client._drain(call)
        return call.content()

    async def import_adapter(self, source: AdapterSource, adapter: str = "", *, allow_other_model: bool = False,
                       on_progress: OnProgress = None) -> context_pb2.Adapter:
        """Makes the file's numbers the adapter's next revision, the first of a new one; nothing changes when they are
        not whole. adapter: the file's own name when empty. allow_other_model: only the shapes must fit. When the
        connection breaks at the very end it may be carried out twice: the same numbers, one revision more.

        `source` is read on another thread.
        """
        call = _transfers.ImportCall(self.name, source, adapter, allow_other_model, _in_loop(on_progress))
        return await self._client._in_thread(call, lambda: self._client._threads._send(call))

    async def delete_adapter(self, adapter: str) -> None:
        request = context_pb2.DeleteAdapterRequest(name=self.name, adapter_id=adapter)
        await self._client._read(_calls.DELETE_ADAPTER, request)
