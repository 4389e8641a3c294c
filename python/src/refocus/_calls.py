"""One class a call: what is sent (again, after a failure), what its events mean, what comes out. No I/O of the network:
client.py and aio.py drive these the same way. Calls that carry files: _transfers.py."""
from __future__ import annotations

import array
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from google.protobuf.message import Message

from refocus.errors import DataLossError
from refocus.options import AdaptOptions, GenerateOptions, KeyRange, Prompt, Question
from refocus.options import chat as chat_message
from refocus.results import Adaptation, Answer, AttentionMass, Progress
from refocus.v1 import cluster_pb2, context_pb2, inference_pb2

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
OnProgress = Callable[[Progress], object] | None


class Method(Generic[Request, Response]):
    def __init__(self, service: str, name: str, request: type[Request], response: type[Response]) -> None:
        self.path = f"/refocus.v1.{service}/{name}"
        self.serialize: Callable[[Request], bytes] = request.SerializeToString
        self.parse: Callable[[bytes], Response] = response.FromString


GET_CLUSTER = Method("ClusterService", "GetCluster", cluster_pb2.GetClusterRequest, cluster_pb2.GetClusterResponse)
GET_MODEL = Method("ClusterService", "GetModel", cluster_pb2.GetModelRequest, cluster_pb2.Model)
CREATE = Method("ContextService", "CreateContext", context_pb2.CreateContextRequest, context_pb2.Context)
PREFILL = Method("ContextService", "PrefillContext", context_pb2.PrefillContextRequest, context_pb2.PrefillEvent)
ADAPT = Method("ContextService", "AdaptContext", context_pb2.AdaptContextRequest, context_pb2.AdaptEvent)
GET_CONTEXT = Method("ContextService", "GetContext", context_pb2.GetContextRequest, context_pb2.Context)
LIST_CONTEXTS = Method("ContextService", "ListContexts", context_pb2.ListContextsRequest,
                       context_pb2.ListContextsResponse)
DELETE_CONTEXT = Method("ContextService", "DeleteContext", context_pb2.DeleteContextRequest,
                        context_pb2.DeleteContextResponse)
DELETE_ADAPTER = Method("ContextService", "DeleteAdapter", context_pb2.DeleteAdapterRequest,
                        context_pb2.DeleteAdapterResponse)
EXPORT_ADAPTER = Method("ContextService", "ExportAdapter", context_pb2.ExportAdapterRequest,
                        context_pb2.ExportAdapterResponse)
IMPORT_ADAPTER = Method("ContextService", "ImportAdapter", context_pb2.ImportAdapterRequest, context_pb2.Adapter)
GENERATE = Method("InferenceService", "Generate", inference_pb2.GenerateRequest, inference_pb2.GenerateEvent)
SCORE = Method("InferenceService", "Score", inference_pb2.ScoreRequest, inference_pb2.ScoreEvent)
PROBE = Method("InferenceService", "ProbeAttention", inference_pb2.ProbeAttentionRequest,
               inference_pb2.ProbeAttentionEvent)
TOKENIZE = Method("InferenceService", "Tokenize", inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse)
DETOKENIZE = Method("InferenceService", "Detokenize", inference_pb2.DetokenizeRequest, inference_pb2.DetokenizeResponse)


def context_name(name: str) -> str:
    """"emma" and "contexts/emma" name the same context."""
    return name if name.startswith("contexts/") else f"contexts/{name}"


def prompt_message(prompt: Prompt) -> inference_pb2.Prompt:
    if isinstance(prompt, inference_pb2.Prompt):
        return prompt
    if isinstance(prompt, str):
        return inference_pb2.Prompt(text=prompt.encode())
    if isinstance(prompt, bytes):
        return inference_pb2.Prompt(text=prompt)
    return inference_pb2.Prompt(ids=context_pb2.TokenIds(ids=prompt))


def put_question(request: inference_pb2.GenerateRequest | inference_pb2.ScoreRequest, prompt: Prompt,
                 chat: Question | None) -> None:
    if chat is not None:
        request.chat.CopyFrom(chat if isinstance(chat, inference_pb2.Chat) else chat_message(chat))
    if chat is None or prompt != "":
        request.prompt.CopyFrom(prompt_message(prompt))


def allow_missing(request: context_pb2.DeleteContextRequest) -> None:
    """The first attempt may have deleted it."""
    request.allow_missing = True


def incomplete(what: str) -> DataLossError:
    return DataLossError(f"{what}: the server ended the stream before its last event; ask again",
                         reason="RESULTS_MISSING")


class Stoppable:
    """`repeatable` says whether a call may be started anew after a failure."""

    def __init__(self) -> None:
        self.repeatable = True
        self.cancel: Callable[[], object] = lambda: None  # of the running attempt
        self._stopped = False

    def runs(self, cancel: Callable[[], object]) -> None:
        """An attempt began."""
        self.cancel = cancel
        if self._stopped:
            cancel()

    def stop(self) -> None:
        """From any thread: this attempt is the last, and ends now."""
        self._stopped = True
        self.repeatable = False
        self.cancel()


class Call(Stoppable, Generic[Request, Response]):
    """A call that answers with a stream."""

    def __init__(self, method: Method[Request, Response]) -> None:
        super().__init__()
        self.method = method

    def request(self) -> Request:
        """Of an attempt."""
        raise NotImplementedError

    def requests(self) -> Iterator[Request] | None:
        """Instead, where the requests are a stream."""
        return None

    def take(self, event: Response) -> bool:
        """False: nothing that a further attempt would not have to bring again, or has brought before."""
        raise NotImplementedError

    def finish(self) -> None:
        """The stream ended well; raises where something is missing."""


class PrefillCall(Call[context_pb2.PrefillContextRequest, context_pb2.PrefillEvent]):
    def __init__(self, name: str, keep_going: bool, on_progress: OnProgress) -> None:
        super().__init__(PREFILL)
        mode = context_pb2.CONTINUE if keep_going else context_pb2.CANCEL
        self._request = context_pb2.PrefillContextRequest(name=name, on_disconnect=mode)
        self._on_progress = on_progress
        self._last: context_pb2.PrefillEvent | None = None

    def request(self) -> context_pb2.PrefillContextRequest:
        return self._request

    def take(self, event: context_pb2.PrefillEvent) -> bool:
        self._last = event
        if self._on_progress is not None:
            self._on_progress(Progress("prefill", event.prefilled_tokens, event.total_tokens, event.tokens_per_second,
                                       event.eta_seconds))
        return True

    def finish(self) -> None:
        if self._last is None or not self._last.HasField("context"):
            raise incomplete("prefill")

    def result(self) -> context_pb2.PrefillEvent:
        assert self._last is not None
        return self._last


class AdaptCall(Call[context_pb2.AdaptContextRequest, context_pb2.AdaptEvent]):
    def __init__(self, name: str, adapter: str, keep_going: bool, on_progress: OnProgress,
                 options: AdaptOptions) -> None:
        super().__init__(ADAPT)
        mode = context_pb2.CONTINUE if keep_going else context_pb2.CANCEL
        options = {"request_id": uuid.uuid4().hex, **options}  # a repeated call attaches instead of adapting twice
        self._request = context_pb2.AdaptContextRequest(name=name, adapter_id=adapter, on_disconnect=mode, **options)
        self._on_progress = on_progress
        self._events: dict[str, context_pb2.AdaptEvent] = {}
        self._steps: list[context_pb2.AdaptEvent.Step] = []
        self._probes: list[context_pb2.AdaptEvent.Probe] = []

    def request(self) -> context_pb2.AdaptContextRequest:
        return self._request

    def take(self, event: context_pb2.AdaptEvent) -> bool:
        kind = event.WhichOneof("event") or ""
        if kind == "step":
            if self._steps and event.step.step <= self._steps[-1].step:
                return False  # who attaches again gets all events from the first
            self._steps.append(event.step)
            if self._on_progress is not None:
                self._on_progress(Progress("adapt", event.step.step, self._events["effective"].effective.steps,
                                           loss=event.step.loss))
            return True
        if kind == "probe":
            if self._probes and event.probe.step <= self._probes[-1].step:
                return False
            self._probes.append(event.probe)
            return True
        new = kind not in self._events
        self._events[kind] = event
        return new

    def finish(self) -> None:
        if "adapter" not in self._events and not (self._request.validate_only and "effective" in self._events):
            raise incomplete("adapt")

    def result(self) -> Adaptation:
        last = self._events.get("adapter", context_pb2.AdaptEvent())
        before, after = self._events.get("probe_loss_before"), self._events.get("probe_loss_after")
        return Adaptation(self._events["effective"].effective, self._steps,
                          None if before is None else before.probe_loss_before,
                          None if after is None else after.probe_loss_after, last.adapter, last.usage, self._probes,
                          self._events["candidates"].candidates if "candidates" in self._events else None)


class GenerateCall(Call[inference_pb2.GenerateRequest, inference_pb2.GenerateEvent]):
    def __init__(self, name: str, prompt: Prompt, adapter: str, chat: Question | None,
                 options: GenerateOptions) -> None:
        super().__init__(GENERATE)
        self._request = inference_pb2.GenerateRequest(name=name, adapter_id=adapter, **options)
        put_question(self._request, prompt, chat)
        self.events: list[inference_pb2.GenerateEvent] = []

    def request(self) -> inference_pb2.GenerateRequest:
        return self._request

    def take(self, event: inference_pb2.GenerateEvent) -> bool:
        self.repeatable = False  # the caller has seen a part: another attempt could sample another one
        self.events.append(event)
        return True

    def finish(self) -> None:
        if sum(event.HasField("summary") for event in self.events) != max(1, self._request.n):
            raise incomplete("generate")

    def answers(self) -> list[Answer]:
        """Of all samples."""
        self.finish()
        samples: list[list[inference_pb2.GenerateEvent]] = [[] for _ in range(max(1, self._request.n))]
        for event in self.events:
            samples[event.sample].append(event)
        return [Answer("".join(event.text for event in events),
                       [id for event in events for id in event.token_ids],
                       [logprob for event in events for logprob in event.logprobs],
                       "".join(event.reasoning for event in events),
                       [logprob for event in events for logprob in event.prompt_logprobs],
                       events[-1].summary,
                       [best for event in events for best in event.prompt_best]) for events in samples]


class ScoreCall(Call[inference_pb2.ScoreRequest, inference_pb2.ScoreEvent]):
    """Its requests are a stream; after a failure only those without a result are sent again."""

    def __init__(self, name: str, targets: Iterable[Prompt], prompt: Prompt, adapter: str, chat: Question | None,
                 token_logprobs: bool) -> None:
        super().__init__(SCORE)
        self._requests = [
            inference_pb2.ScoreRequest(name=name, adapter_id=adapter, target=prompt_message(target),
                                       token_logprobs=token_logprobs, target_id=str(index))
            for index, target in enumerate(targets)]
        for request in self._requests:
            put_question(request, prompt, chat)
        self.results: list[inference_pb2.ScoreEvent] = []

    def requests(self) -> Iterator[inference_pb2.ScoreRequest]:
        return iter(self._requests[len(self.results):])

    @property
    def count(self) -> int:
        return len(self._requests)

    def take(self, event: inference_pb2.ScoreEvent) -> bool:
        self.results.append(event)
        return True

    def finish(self) -> None:
        if len(self.results) != len(self._requests):
            raise incomplete(f"score: got {len(self.results)} results of {len(self._requests)}")


class ProbeCall(Call[inference_pb2.ProbeAttentionRequest, inference_pb2.ProbeAttentionEvent]):
    def __init__(self, name: str, ranges: Sequence[KeyRange], prompt: Prompt, adapter: str, positions: Sequence[int],
                 layers: Sequence[int], heads: Sequence[int], mean_over_heads: bool, mean_over_rows: bool) -> None:
        super().__init__(PROBE)
        key_range = inference_pb2.ProbeAttentionRequest.KeyRange
        self._request = inference_pb2.ProbeAttentionRequest(
            name=name, adapter_id=adapter, prompt=prompt_message(prompt), positions=positions, layers=layers,
            heads=heads, ranges=[key_range(begin=begin, end=end) for begin, end in ranges],
            mean_over_heads=mean_over_heads, mean_over_rows=mean_over_rows)
        self._events: list[inference_pb2.ProbeAttentionEvent] = []

    def request(self) -> inference_pb2.ProbeAttentionRequest:
        self._events.clear()
        return self._request

    def take(self, event: inference_pb2.ProbeAttentionEvent) -> bool:
        self._events.append(event)
        return True

    def finish(self) -> None:
        if not self._events or not self._events[-1].HasField("summary"):
            raise incomplete("probe")

    def result(self) -> AttentionMass:
        summary = self._events[-1].summary
        rows: dict[int, array.array[float]] = {layer: array.array("f") for layer in summary.layers}
        positions: list[int] = []
        for event in self._events[:-1]:
            rows[event.layer].extend(event.mass)
            if event.layer == summary.layers[0]:
                positions.extend(event.positions)
        values = array.array("f")
        for layer in summary.layers:
            values.extend(rows[layer])
        heads = [] if self._request.mean_over_heads else list(summary.heads)
        ranges = [(r.begin, r.end) for r in self._request.ranges]
        return AttentionMass(list(summary.layers), positions, ranges, heads, values, summary)
