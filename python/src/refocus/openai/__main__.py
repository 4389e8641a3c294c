"""The HTTP server: python3 -m refocus.openai --address 127.0.0.1:7070 --listen 127.0.0.1:8000"""
from __future__ import annotations

import argparse
import http.server
import json
import signal
import socketserver
import sys
import threading
from collections.abc import Iterator
from typing import Any

import refocus
from refocus.openai.answers import Port
from refocus.openai.bodies import BodyError, adapt_options, completion, conversation, field_of
from refocus.options import AdaptOptions

MAX_BODY = 64 << 20
_STATUS = {refocus.InvalidArgumentError: 400, refocus.OutOfRangeError: 400, refocus.FailedPreconditionError: 400,
           refocus.NotFoundError: 404, refocus.ResourceExhaustedError: 429, refocus.UnavailableError: 503,
           refocus.DeadlineExceededError: 504, refocus.AbortedError: 409}
_KINDS = {400: "invalid_request_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], port: Port, adapt: AdaptOptions | None) -> None:
        super().__init__(address, Handler)
        self.port = port
        self.adapt = adapt


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "refocus"
    timeout = 120.0  # seconds in which a caller neither sends nor takes anything

    def do_GET(self) -> None:
        self._run({"/health": self._health, "/v1/models": self._models, "/tokenizer_info": self._tokenizer})

    def do_POST(self) -> None:
        self._run({"/v1/completions": self._completion, "/v1/chat/completions": self._conversation,
                   "/tokenize": self._tokenize, "/detokenize": self._detokenize})

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    # ---- Routes.

    def _health(self) -> None:
        serving = self.server.port.client.cluster().state == refocus.Cluster.SERVING
        self._send(200 if serving else 503, {"status": "ok" if serving else "not serving"})

    def _models(self) -> None:
        model = self.server.port.model
        self._send(200, {"object": "list", "data": [{"id": model.name, "object": "model", "created": 0,
                                                     "owned_by": "refocus", "max_model_len": model.max_positions}]})

    def _tokenizer(self) -> None:
        port = self.server.port
        model = port.model
        eos = port.spelled(model.eos_token_ids[0]) if model.eos_token_ids else None
        bos = port.spelled(model.bos_token_id) if model.HasField("bos_token_id") else None
        self._send(200, {"tokenizer_class": "refocus", "eos_token": eos, "bos_token": bos, "pad_token": eos,
                         "model_max_length": model.max_positions})

    def _tokenize(self) -> None:
        body = self._body()
        text = field_of(body, "prompt", str)
        if text is None:
            raise BodyError("prompt", None, "a string")
        special = field_of(body, "add_special_tokens", bool)
        ids = self.server.port.tokenize(text, add_bos=special is None or special)
        self._send(200, {"tokens": ids, "count": len(ids), "max_model_len": self.server.port.model.max_positions})

    def _detokenize(self) -> None:
        ids = field_of(self._body(), "tokens", list)
        if ids is None or not all(type(id) is int and 0 <= id < 1 << 32 for id in ids):
            raise BodyError("tokens", ids, "an array of token ids")
        self._send(200, {"prompt": self.server.port.client.detokenize(ids)})

    def _completion(self) -> None:
        question = completion(self._body())
        question.adapt = question.adapt if question.adapt is not None else self.server.adapt
        if not question.stream:
            self._send(200, self.server.port.completion(question))
        elif question.echo or "logprobs" in question.options:
            raise BodyError("stream", True, "false with echo or logprobs")
        else:
            self._stream(self.server.port.stream(question))

    def _conversation(self) -> None:
        question = conversation(self._body())
        question.adapt = question.adapt if question.adapt is not None else self.server.adapt
        if question.stream:
            self._stream(self.server.port.stream(question))
        else:
            self._send(200, self.server.port.message(question))

    # ---- HTTP.

    def _run(self, routes: dict[str, Any]) -> None:
        self._begun = False
        route = routes.get(self.path.split("?")[0])
        try:
            if route is None:
                self.close_connection = True  # a body may follow that nobody reads
                self._refuse(404, f"path: got {self.path}, allowed {', '.join(sorted(routes))}")
                return
            route()
        except BodyError as error:
            self._refuse(400, str(error), error.field)
        except refocus.RefocusError as error:
            status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
            self._refuse(status, str(error), error.reason or None, error.retry_after)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the caller went away; closing the stream cancelled the answer
        except TimeoutError:
            raise  # the base class closes the connection
        except Exception as error:
            print(f"refocus openai: {self.path}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self.close_connection = True
            self._refuse(500, f"{type(error).__name__}: {error}")

    def _body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MAX_BODY:
            self.close_connection = True
            raise BodyError("Content-Length", self.headers.get("Content-Length"), f"0 to {MAX_BODY}")
        try:
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise BodyError("body", str(error), "JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise BodyError("body", body, "a JSON object")
        return body

    def _send(self, status: int, answer: dict[str, Any], retry_after: float | None = None) -> None:
        data = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", str(max(1, round(retry_after))))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        error = {"error": {"message": message, "type": _KINDS.get(status, "server_error"), "param": param,
                           "code": status}}
        if self._begun:  # of a stream: the last event says what happened
            self._chunk(b"data: " + json.dumps(error).encode() + b"\n\n")
            self._chunk(b"")
        else:
            self._send(status, error, retry_after)

    def _stream(self, chunks: Iterator[dict[str, Any]]) -> None:
        for chunk in chunks:
            if not self._begun:  # what is refused at once still has a status of its own
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Cache-Control", "no-cache")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._begun = True
            self._chunk(b"data: " + json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
        self.wfile.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="refocus openai", description="An HTTP port of a Refocus service for clients of "
                                                                        "OpenAI's interface: completions with echo and "
                                                                        "log-probabilities, conversations, tokens.")
    parser.add_argument("--address", default="127.0.0.1:7070", help="of the service (%(default)s)")
    parser.add_argument("--listen", default="127.0.0.1:8000", help="HOST:PORT; port 0 takes a free one (%(default)s)")
    parser.add_argument("--adapt", metavar="NAME=VALUE,...", help="adapt to each text before it is asked about, e.g. "
                        "steps=32,learning_rate=1e-4; a request's \"refocus\": {\"adapt\": ...} goes before it")
    parser.add_argument("--question-tokens", type=int, default=256,
                        help="of a prompt's end: what is asked, and not adapted to (%(default)s)")
    parser.add_argument("--keep", type=int, default=4, help="texts kept open that nobody asks about now (%(default)s)")
    parser.add_argument("--insecure", action="store_true", help="allow another address than 127.0.0.1: there is neither "
                                                                "encryption nor authentication")
    return parser


def _settings(text: str) -> AdaptOptions:
    values: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        try:
            values[name] = json.loads(value)
        except ValueError:
            raise BodyError("--adapt " + name, value, "a number") from None
    return adapt_options(values, "--adapt ")


def main() -> int:
    options = _parser().parse_args()
    host, _, number = options.listen.rpartition(":")
    try:
        if not number.isdecimal() or int(number) > 65535:
            raise BodyError("--listen", options.listen, "HOST:PORT")
        if host not in ("127.0.0.1", "localhost") and not options.insecure:
            raise BodyError("--listen", options.listen, "127.0.0.1, or any address with --insecure")
        if options.question_tokens < 1 or options.keep < 0:
            raise BodyError("--question-tokens, --keep", (options.question_tokens, options.keep), "1 or more, 0 or more")
        adapt = None if options.adapt is None else _settings(options.adapt)
    except BodyError as error:
        print(f"refocus openai: {error}", file=sys.stderr)
        return 2
    with refocus.Client(options.address) as client:
        try:
            port = Port(client, options.keep, options.question_tokens)
            server = Server((host, int(number)), port, adapt)
        except (refocus.RefocusError, OSError) as error:
            print(f"refocus openai: {error}", file=sys.stderr)
            return 1
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"Ready: http://{server.server_address[0]!s}:{server.server_address[1]}/v1, model {port.model.name}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        server.server_close()
        port.contexts.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
