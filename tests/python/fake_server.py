"""A service that does what a test says: an ordinary gRPC server whose methods are functions of the test."""
import threading
from concurrent import futures

import grpc
from google.protobuf.duration_pb2 import Duration

from refocus import _calls, errors

METHODS = {method.path: method for method in vars(_calls).values() if isinstance(method, _calls.Method)}
REQUEST_STREAMS = {"CreateContext", "ImportAdapter", "Score"}
RESPONSE_STREAMS = {"PrefillContext", "AdaptContext", "ExportAdapter", "Generate", "Score", "ProbeAttention"}
REQUESTS = {
    "GetCluster": _calls.cluster_pb2.GetClusterRequest,
    "GetModel": _calls.cluster_pb2.GetModelRequest,
    "CreateContext": _calls.context_pb2.CreateContextRequest,
    "PrefillContext": _calls.context_pb2.PrefillContextRequest,
    "AdaptContext": _calls.context_pb2.AdaptContextRequest,
    "GetContext": _calls.context_pb2.GetContextRequest,
    "ListContexts": _calls.context_pb2.ListContextsRequest,
    "DeleteContext": _calls.context_pb2.DeleteContextRequest,
    "DeleteAdapter": _calls.context_pb2.DeleteAdapterRequest,
    "ExportAdapter": _calls.context_pb2.ExportAdapterRequest,
    "ImportAdapter": _calls.context_pb2.ImportAdapterRequest,
    "Generate": _calls.inference_pb2.GenerateRequest,
    "Score": _calls.inference_pb2.ScoreRequest,
    "ProbeAttention": _calls.inference_pb2.ProbeAttentionRequest,
    "Tokenize": _calls.inference_pb2.TokenizeRequest,
    "Detokenize": _calls.inference_pb2.DetokenizeRequest,
}


def fail(context, code, reason="", message="as the test wants", metadata=None, retry_after=None):
    """Ends the call as the service would."""
    if reason:
        status = errors._STATUS(code=code.value[0], message=message)
        info = errors._ERROR_INFO(reason=reason, domain="refocus", metadata=metadata or {})
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
        if retry_after is not None:
            delay = Duration(seconds=int(retry_after), nanos=int(retry_after % 1 * 1e9))
            retry = errors._RETRY_INFO()
            retry.retry_delay.MergeFromString(delay.SerializeToString())
            status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=retry.SerializeToString())
        context.set_trailing_metadata(((errors.DETAILS_KEY, status.SerializeToString()),))
    context.abort(code, message)


class FakeServer(grpc.GenericRpcHandler):
    """on["Generate"] = function(request, context) -> a response, or an iterable of them; a list: of the n-th call."""

    def __init__(self):
        self.on = {}
        self.calls = []  # (name, request, or list of requests as they came)
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(16), handlers=(self,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self):
        self._server.stop(None).wait()

    def named(self, name):
        return [request for called, request in self.calls if called == name]

    def service(self, details):
        name = details.method.rsplit("/", 1)[1]
        if details.method not in METHODS or name not in self.on:
            return None
        to_bytes = lambda response: response.SerializeToString()
        kinds = (name in REQUEST_STREAMS, name in RESPONSE_STREAMS)
        make = {(False, False): grpc.unary_unary_rpc_method_handler,
                (True, False): grpc.stream_unary_rpc_method_handler,
                (False, True): grpc.unary_stream_rpc_method_handler,
                (True, True): grpc.stream_stream_rpc_method_handler}
        return make[kinds](lambda request, context: self._run(name, request, context),
                           request_deserializer=REQUESTS[name].FromString, response_serializer=to_bytes)

    def _run(self, name, request, context):
        if name in REQUEST_STREAMS:
            seen = []
            request = self._noted(request, seen)
        else:
            seen = request
        with self._lock:
            behaviour = self.on[name]
            if isinstance(behaviour, list):
                behaviour = behaviour[min(len(self.named(name)), len(behaviour) - 1)]
            self.calls.append((name, seen))
        return behaviour(request, context)

    @staticmethod
    def _noted(requests, seen):
        for request in requests:
            seen.append(request)
            yield request
