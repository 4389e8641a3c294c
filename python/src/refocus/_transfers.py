"""Calls that carry a file: a text to the server, an adapter both ways. As in _calls.py: no I/O of the network."""
from __future__ import annotations

import array
import contextlib
import hashlib
import io
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO, Generic, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from refocus._calls import CREATE, EXPORT_ADAPTER, IMPORT_ADAPTER, Call, Method, OnProgress, Stoppable, incomplete
from refocus.options import AdapterSource, CreateOptions, Source
from refocus.results import Progress
from refocus.v1 import context_pb2

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

CHUNK_BYTES = 512 << 10
CHECKSUM_BYTES = 32  # at the end of an adapter's file


class Content:
    """What is sent, in pieces; again from the start where it can be read again."""

    def __init__(self, source: bytes | array.array[int] | os.PathLike[str] | BinaryIO) -> None:
        self._source = source
        self._start = 0
        self._seekable = False
        self.repeatable = True
        if not isinstance(source, (bytes, array.array, os.PathLike)):
            self.repeatable = self._seekable = source.seekable()
            self._start = source.tell() if self._seekable else 0

    def total(self) -> int:
        """Bytes or ids; 0: not known."""
        if isinstance(self._source, os.PathLike):
            return os.stat(self._source).st_size
        return len(self._source) if isinstance(self._source, (bytes, array.array)) else 0

    def pieces(self) -> Iterator[bytes | array.array[int]]:
        if isinstance(self._source, array.array):
            step = CHUNK_BYTES // 4
            yield from (self._source[i:i + step] for i in range(0, len(self._source), step))
        elif isinstance(self._source, bytes):
            yield from (self._source[i:i + CHUNK_BYTES] for i in range(0, len(self._source), CHUNK_BYTES))
        elif isinstance(self._source, os.PathLike):
            with open(self._source, "rb") as file:
                yield from _read(file)
        else:
            if self._seekable:
                self._source.seek(self._start)
            yield from _read(self._source)


def _read(file: BinaryIO | io.BufferedReader) -> Iterator[bytes]:
    while piece := file.read(CHUNK_BYTES):
        if not isinstance(piece, bytes):
            raise TypeError(f"source: got a file of {type(piece).__name__}, allowed one opened in binary mode")
        yield piece


class Sending(Stoppable, Generic[Request, Response]):
    """A call whose requests are a stream and whose answer is one message."""

    def __init__(self, method: Method[Request, Response], content: Content, phase: str,
                 on_progress: OnProgress) -> None:
        super().__init__()
        self.method = method
        self.repeatable = content.repeatable
        self.failure: BaseException | None = None  # what reading the source raised: gRPC swallows it
        self._content = content
        self._phase = phase
        self._on_progress = on_progress

    def messages(self) -> Iterator[Request]:
        """Of an attempt."""
        try:
            yield from self._messages()
        except Exception as error:
            self.failure = error
            raise

    def _messages(self) -> Iterator[Request]:
        raise NotImplementedError

    def _pieces(self) -> Iterator[tuple[int, bytes | array.array[int]]]:
        """With what came before each; progress is told behind it."""
        done, total = 0, self._content.total()
        for piece in self._content.pieces():
            yield done, piece
            done += len(piece)
            if self._on_progress is not None:
                self._on_progress(Progress(self._phase, done, max(total, done) if total else 0))


class Upload(Sending[context_pb2.CreateContextRequest, context_pb2.Context]):
    def __init__(self, source: Source, context_id: str, ttl: float | None, on_progress: OnProgress,
                 options: CreateOptions) -> None:
        options = {"request_id": uuid.uuid4().hex, **options}  # a repeated upload returns the first one's context
        self._header = context_pb2.CreateContextRequest.Header(context_id=context_id, **options)
        if ttl is not None:
            self._header.ttl.CopyFrom(Duration(seconds=int(ttl), nanos=int(ttl % 1 * 1e9)))
        if isinstance(source, str):
            content = Content(source.encode())
        elif isinstance(source, (bytes, os.PathLike)):
            content = Content(source)
        elif hasattr(source, "read"):
            content = Content(cast(BinaryIO, source))
        else:
            content = Content(array.array("I", source))
        super().__init__(CREATE, content, "upload", on_progress)

    def _messages(self) -> Iterator[context_pb2.CreateContextRequest]:
        yield context_pb2.CreateContextRequest(header=self._header)
        digest = hashlib.sha256()
        total = 0
        for offset, piece in self._pieces():
            if isinstance(piece, bytes):
                chunk = context_pb2.CreateContextRequest.Chunk(offset=offset, text=piece)
                digest.update(piece)
            else:
                chunk = context_pb2.CreateContextRequest.Chunk(offset=offset, ids=context_pb2.TokenIds(ids=piece))
                digest.update(chunk.ids.SerializeToString()[-4 * len(piece):])  # packed fixed32: little-endian words
            yield context_pb2.CreateContextRequest(chunk=chunk)
            total = offset + len(piece)
        finish = context_pb2.CreateContextRequest.Finish(total=total, sha256=digest.digest())
        yield context_pb2.CreateContextRequest(finish=finish)


class ImportCall(Sending[context_pb2.ImportAdapterRequest, context_pb2.Adapter]):
    def __init__(self, name: str, source: AdapterSource, adapter: str, allow_other_model: bool,
                 on_progress: OnProgress) -> None:
        self._header = context_pb2.ImportAdapterRequest.Header(name=name, adapter_id=adapter,
                                                               allow_other_model=allow_other_model)
        super().__init__(IMPORT_ADAPTER, Content(pathlib.Path(source) if isinstance(source, str) else source), "import",
                         on_progress)

    def _messages(self) -> Iterator[context_pb2.ImportAdapterRequest]:
        yield context_pb2.ImportAdapterRequest(header=self._header)
        for _, piece in self._pieces():
            yield context_pb2.ImportAdapterRequest(data=bytes(piece))
        yield context_pb2.ImportAdapterRequest(finish=context_pb2.ImportAdapterRequest.Finish())


class ExportCall(Call[context_pb2.ExportAdapterRequest, context_pb2.ExportAdapterResponse]):
    """Writes to `out`, anew with every attempt."""

    def __init__(self, name: str, adapter: str, on_progress: OnProgress) -> None:
        super().__init__(EXPORT_ADAPTER)
        self.out: BinaryIO = io.BytesIO()
        self._request = context_pb2.ExportAdapterRequest(name=name, adapter_id=adapter)
        self._on_progress = on_progress
        self._digest = hashlib.sha256()
        self._end = b""  # of what came: its checksum, when it is whole
        self._done = self._total = 0

    def request(self) -> context_pb2.ExportAdapterRequest:
        self.out.seek(0)
        self.out.truncate()
        self._digest = hashlib.sha256()
        self._end = b""
        self._done = self._total = 0
        return self._request

    def take(self, event: context_pb2.ExportAdapterResponse) -> bool:
        self.out.write(event.data)
        data = self._end + event.data
        self._digest.update(data[:-CHECKSUM_BYTES])
        self._end = data[-CHECKSUM_BYTES:]
        self._done += len(event.data)
        self._total = self._total or event.total_bytes
        if self._on_progress is not None:
            self._on_progress(Progress("export", self._done, self._total))
        return False

    def finish(self) -> None:
        if self._done != self._total or self._end != self._digest.digest():
            raise incomplete("export_adapter")

    def content(self) -> bytes:
        """All of them, where `out` was left as it is."""
        assert isinstance(self.out, io.BytesIO)
        return self.out.getvalue()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends well; otherwise what had that name stays as it is."""
    part = os.fspath(path) + ".part"
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
