"""Errors of the service as exceptions: a class for each status code, with a reason that programs can rely on."""
from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DETAILS_KEY = "grpc-status-details-bin"


class RefocusError(Exception):
    """A call failed. `str()` says what, what was got, what is allowed and what to do."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None,
                 retry_after: float | None = None, code: grpc.StatusCode | None = None) -> None:
        super().__init__(f"{message} [{reason}]" if reason else message)
        self.message = message
        self.reason = reason  # "CONTEXT_NOT_FOUND"; empty when gRPC itself refused
        self.metadata = dict(metadata or {})  # every variable part of the message
        self.retry_after = retry_after  # seconds after which another try may succeed, where the server says so
        if code is not None:
            self.code = code


class CancelledError(RefocusError):
    code = grpc.StatusCode.CANCELLED


class InvalidArgumentError(RefocusError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceededError(RefocusError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFoundError(RefocusError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(RefocusError):
    code = grpc.StatusCode.ALREADY_EXISTS


class ResourceExhaustedError(RefocusError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPreconditionError(RefocusError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class AbortedError(RefocusError):
    code = grpc.StatusCode.ABORTED


class OutOfRangeError(RefocusError):
    code = grpc.StatusCode.OUT_OF_RANGE


class UnimplementedError(RefocusError):
    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(RefocusError):
    code = grpc.StatusCode.INTERNAL


class UnavailableError(RefocusError):
    code = grpc.StatusCode.UNAVAILABLE


class DataLossError(RefocusError):
    code = grpc.StatusCode.DATA_LOSS


_BY_CODE = {error.code: error for error in RefocusError.__subclasses__()}


def _error_messages() -> tuple[Any, Any, Any]:
    # In a pool of their own: others in this process may know the same messages by other files.
    data = importlib.resources.files("refocus.v1").joinpath("error_details.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)  # type: ignore[no-untyped-call,unused-ignore]
    status, info, retry = (message_factory.GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}"))
                           for name in ("Status", "ErrorInfo", "RetryInfo"))
    return status, info, retry


_STATUS, _ERROR_INFO, _RETRY_INFO = _error_messages()


def from_rpc(error: Any) -> RefocusError:
    """What gRPC raised (grpc.RpcError of a call, grpc.aio.AioRpcError) with the details that the server attached."""
    code = error.code()
    message = error.details() or code.name
    reason, metadata, retry_after = "", {}, None
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = _STATUS.FromString(value)
        except Exception:  # not from this service: the code and the message are still true
            continue
        for detail in status.details:
            kind = detail.type_url.rsplit("/", 1)[-1]
            if kind == "google.rpc.ErrorInfo":
                info = _ERROR_INFO.FromString(detail.value)
                reason, metadata = info.reason, dict(info.metadata)
            elif kind == "google.rpc.RetryInfo":
                delay = _RETRY_INFO.FromString(detail.value).retry_delay
                retry_after = delay.seconds + delay.nanos * 1e-9
    kind_of_error = _BY_CODE.get(code, RefocusError)
    return kind_of_error(message, reason=reason, metadata=metadata, retry_after=retry_after, code=code)
