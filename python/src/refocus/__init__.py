"""Client of a Refocus service: open a long text once, adapt the model's queries to it, ask many questions.

    with refocus.Client("127.0.0.1:7070") as client:
        with client.create(pathlib.Path("emma.txt")) as context:
            context.adapt(steps=32)
            print(context.ask("Who is Mr. Knightley?", adapter="default").text)

refocus.aio.Client is the same for asyncio.
"""
from refocus import aio
from refocus.client import AnswerStream, Client, Context
from refocus.errors import (AbortedError, AlreadyExistsError, CancelledError, DataLossError, DeadlineExceededError,
                            FailedPreconditionError, InternalError, InvalidArgumentError, NotFoundError,
                            OutOfRangeError, RefocusError, ResourceExhaustedError, UnavailableError, UnimplementedError)
from refocus.options import (AdapterSource, AdaptOptions, GenerateOptions, KeyRange, Prompt, Question, Source, chat,
                             prologue)
from refocus.results import Adaptation, Answer, AttentionMass, Progress
from refocus.retry import RetryPolicy
from refocus.v1.cluster_pb2 import GetClusterResponse as Cluster
from refocus.v1.cluster_pb2 import Model
from refocus.v1.context_pb2 import Adapter, PrefillEvent, Prologue
from refocus.v1.context_pb2 import Context as ContextInfo
from refocus.v1.inference_pb2 import Chat, GenerateEvent, GenerateSummary, ProbeAttentionSummary
from refocus.v1.inference_pb2 import ScoreEvent as Score

__all__ = [
    "AbortedError", "AdaptOptions", "Adaptation", "Adapter", "AdapterSource", "AlreadyExistsError", "Answer",
    "AnswerStream", "AttentionMass", "CancelledError", "Chat", "Client", "Cluster", "Context", "ContextInfo",
    "DataLossError", "DeadlineExceededError", "FailedPreconditionError", "GenerateEvent", "GenerateOptions", "GenerateSummary",
    "InternalError", "InvalidArgumentError", "KeyRange", "Model", "NotFoundError", "OutOfRangeError", "PrefillEvent",
    "ProbeAttentionSummary", "Progress", "Prologue", "Prompt", "Question", "RefocusError", "ResourceExhaustedError",
    "RetryPolicy", "Score", "Source", "UnavailableError", "UnimplementedError", "aio", "chat", "prologue",
]
