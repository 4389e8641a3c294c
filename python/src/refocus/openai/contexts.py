"""The contexts behind the port's requests: opened once a text, adapted once a setting, kept while they are asked for."""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Sequence

import refocus
from refocus.options import AdaptOptions

IDLE_SECONDS = 600.0  # after which the service frees what a gateway that went away has left


@dataclasses.dataclass(frozen=True)
class Text:
    """What a context holds: ids, or the beginning of a user's turn in a conversation."""

    ids: tuple[int, ...] | None = None
    system: str | None = None
    user: str = ""

    def key(self) -> str:
        return hashlib.sha256(repr((self.ids, self.system, self.user)).encode()).hexdigest()


class _Kept:
    def __init__(self) -> None:
        self.lock = threading.Lock()  # opening and adapting: one caller at a time
        self.users = 0
        self.context: refocus.Context | None = None
        self.adapters: set[str] = set()


class Contexts:
    """At most `most` that nobody uses; thread-safe."""

    def __init__(self, client: refocus.Client, most: int) -> None:
        self._client = client
        self._most = most
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, _Kept] = collections.OrderedDict()

    @contextlib.contextmanager
    def opened(self, text: Text, adapt: AdaptOptions | None) -> Iterator[tuple[refocus.Context, str]]:
        """The context with its K and V, and the name of the adapter that answers (empty: none)."""
        key = text.key()
        with self._lock:
            kept = self._kept.setdefault(key, _Kept())
            self._kept.move_to_end(key)
            kept.users += 1
        try:
            with kept.lock:
                context = self._ready(kept, text)
                adapter = self._adapted(kept, context, adapt) if adapt is not None else ""
            yield context, adapter
        finally:
            with self._lock:
                kept.users -= 1
            self._shrink()

    def close(self) -> None:
        self._most = 0
        self._shrink()

    def _ready(self, kept: _Kept, text: Text) -> refocus.Context:
        if kept.context is not None:
            try:
                kept.context.prefill()  # built again after a rank was lost; touches it
                return kept.context
            except refocus.NotFoundError:  # idle for too long
                kept.context, kept.adapters = None, set()
        if text.ids is not None:
            source: str | Sequence[int] = text.ids
            context = self._client.create(source, ttl=IDLE_SECONDS, no_bos=True, prefill=False)
        else:
            context = self._client.create(text.user, ttl=IDLE_SECONDS, prefill=False,
                                          prologue=refocus.prologue(text.system))
        try:
            context.prefill(keep_going=False)
        except refocus.RefocusError:
            with contextlib.suppress(refocus.RefocusError):
                context.delete(force=True, allow_missing=True)
            raise
        kept.context = context
        return context

    @staticmethod
    def _adapted(kept: _Kept, context: refocus.Context, adapt: AdaptOptions) -> str:
        settings = repr(sorted(adapt.items())).encode()
        name = "port-" + hashlib.sha256(settings).hexdigest()[:16]
        if name not in kept.adapters:
            # The same settings draw the same spans: the same request gets the same answer.
            options: AdaptOptions = {"seed": int.from_bytes(hashlib.sha256(settings).digest()[:8]), **adapt}
            context.adapt(name, **options)
            kept.adapters.add(name)
        return name

    def _shrink(self) -> None:
        gone: list[refocus.Context] = []
        with self._lock:
            idle = [key for key, kept in self._kept.items() if kept.users == 0]
            for key in idle[:max(0, len(idle) - self._most)]:
                context = self._kept.pop(key).context
                if context is not None:
                    gone.append(context)
        for context in gone:
            with contextlib.suppress(refocus.RefocusError):
                context.delete(force=True, allow_missing=True)
