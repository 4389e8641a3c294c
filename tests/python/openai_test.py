"""The HTTP port as its clients use it, in front of a server that answers as a test says."""
import contextlib
import http.client
import io
import json
import os
import threading
import unittest

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

import refocus
from fake_server import FakeServer, fail
from refocus.openai.__main__ import Server
from refocus.openai.answers import Port
from refocus.v1 import cluster_pb2, context_pb2, inference_pb2

Event = inference_pb2.GenerateEvent
Summary = inference_pb2.GenerateSummary
LETTERS = "abcdefghijklmnopqrstuvwxyz \n?"


def ids_of(text):
    return [LETTERS.index(letter) for letter in text]


def logprob(id, value, top=()):
    return inference_pb2.TokenLogprob(id=id, logprob=value,
                                      top=[inference_pb2.TokenLogprob(id=i, logprob=v) for i, v in top])


class OpenAiTest(unittest.TestCase):
    def setUp(self):
        self.service = FakeServer()
        self.opened = {}
        model = cluster_pb2.Model(name="letters", max_positions=1000, eos_token_ids=[27], has_tokenizer=True)
        self.service.on = {
            "GetModel": lambda request, context: model,
            "GetCluster": lambda request, context: cluster_pb2.GetClusterResponse(
                state=cluster_pb2.GetClusterResponse.SERVING),
            "Tokenize": lambda request, context: inference_pb2.TokenizeResponse(ids=ids_of(request.text.decode())),
            "Detokenize": lambda request, context: inference_pb2.DetokenizeResponse(
                text="".join(LETTERS[id] for id in request.ids)),
            "CreateContext": self.create,
            "PrefillContext": self.prefill,
            "AdaptContext": self.adapt,
            "DeleteContext": lambda request, context: context_pb2.DeleteContextResponse(),
            "Generate": self.generate,
        }
        self.client = refocus.Client(self.service.address, retry=refocus.RetryPolicy(attempts=1))
        self.start(None)

    def start(self, adapt, keep=2, question_tokens=4):
        port = Port(self.client, keep, question_tokens)
        self.http = Server(("127.0.0.1", 0), port, adapt)
        thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        thread.start()
        server = self.http

        def end():
            server.shutdown()
            server.server_close()
            port.contexts.close()
            thread.join()

        self.addCleanup(end)

    def doCleanups(self):
        result = super().doCleanups()
        self.client.close()
        self.service.stop()
        return result

    def prefill(self, request, context):
        yield context_pb2.PrefillEvent(context=context_pb2.Context(name=request.name))

    def adapt(self, request, context):
        yield context_pb2.AdaptEvent(effective=context_pb2.AdaptEvent.Effective(steps=request.steps))
        yield context_pb2.AdaptEvent(adapter=context_pb2.Adapter(id=request.adapter_id))

    def create(self, requests, context):
        messages = list(requests)
        name = f"contexts/c{len(self.opened)}"
        ids = [id for message in messages for id in message.chunk.ids.ids]
        self.opened[name] = ids if ids else b"".join(message.chunk.text for message in messages).decode()
        self.header = messages[0].header
        return context_pb2.Context(name=name)

    def generate(self, request, context):
        self.request = request
        for sample in range(max(1, request.n)):
            if request.prompt_logprobs and sample == 0:
                prompt = list(request.prompt.ids.ids)
                yield Event(prompt_logprobs=[-0.5] * len(prompt), prompt_best=[logprob(0, -0.25) for _ in prompt])
            yield Event(sample=sample, text="y", token_ids=[24], logprobs=[logprob(24, -1, [(24, -1), (25, -2)])])
            yield Event(sample=sample, text="es", token_ids=[4, 18], logprobs=[logprob(4, -3), logprob(18, -4)])
            yield Event(sample=sample, summary=Summary(finish_reason=inference_pb2.FINISH_LENGTH, generated_tokens=3,
                                                       context_tokens=5, prompt_tokens=2))

    def call(self, path, body=None, method="POST", raw=None):
        connection = http.client.HTTPConnection(*self.http.server_address, timeout=20)
        try:
            data = raw if raw is not None else None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            self.headers = response.headers
            return response.status, text if response.headers["Content-Type"] == "text/event-stream" else json.loads(text)
        finally:
            connection.close()

    def refused(self, path, body, *words):
        status, answer = self.call(path, body)
        self.assertEqual(400, status, answer)
        for word in words:
            self.assertIn(word, answer["error"]["message"])

    def test_models_health_and_tokens(self):
        self.assertEqual((200, "letters"), (self.call("/v1/models", method="GET")[0],
                                            self.call("/v1/models", method="GET")[1]["data"][0]["id"]))
        self.assertEqual(200, self.call("/health", method="GET")[0])
        self.assertEqual("\n", self.call("/tokenizer_info", method="GET")[1]["eos_token"])
        self.assertEqual([7, 8], self.call("/tokenize", {"prompt": "hi", "add_special_tokens": False})[1]["tokens"])
        self.assertEqual("hi", self.call("/detokenize", {"tokens": [7, 8]})[1]["prompt"])
        self.assertEqual(404, self.call("/v2/models", method="GET")[0])

    def test_completion_opens_the_text_and_asks_its_end(self):
        status, answer = self.call("/v1/completions", {"model": "any", "prompt": "a long text who?", "max_tokens": 3,
                                                       "temperature": 0, "stop": "\n", "seed": 5})
        self.assertEqual(200, status, answer)
        self.assertEqual({"index": 0, "text": "yes", "logprobs": None, "finish_reason": "length"}, answer["choices"][0])
        self.assertEqual({"prompt_tokens": 16, "completion_tokens": 3, "total_tokens": 19}, answer["usage"])
        self.assertEqual(ids_of("a long text "), self.opened["contexts/c0"])
        self.assertEqual(ids_of("who?"), list(self.request.prompt.ids.ids))
        self.assertEqual((3, 0.0, ["\n"], 5, ""), (self.request.max_tokens, self.request.temperature,
                                                   list(self.request.stop), self.request.seed, self.request.adapter_id))
        self.assertTrue(self.header.no_bos, "the ids have it already")

    def test_a_text_is_opened_once_and_let_go(self):
        for question in ("who?", "why?", "wo a"):
            self.assertEqual(200, self.call("/v1/completions", {"prompt": "a long text " + question})[0])
        self.assertEqual(1, len(self.opened))
        for text in ("b", "c", "d"):
            self.call("/v1/completions", {"prompt": text + " long text who?"})
        self.assertEqual(4, len(self.opened))
        self.assertEqual(["contexts/c0", "contexts/c1"], [r.name for r in self.service.named("DeleteContext")])

    def test_a_context_that_has_gone_is_opened_again(self):
        self.call("/v1/completions", {"prompt": "a long text who?"})

        def gone(request, context):
            fail(context, grpc.StatusCode.NOT_FOUND, "CONTEXT_NOT_FOUND")
            yield

        self.service.on["PrefillContext"] = [None, gone, self.prefill]
        self.assertEqual(200, self.call("/v1/completions", {"prompt": "a long text who?"})[0])
        self.assertEqual(2, len(self.opened))

    # As lm-evaluation-harness asks for a likelihood, and reads it.
    def test_echo_scores_the_prompt(self):
        prompt = ids_of("she is")
        status, answer = self.call("/v1/completions", {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1,
                                                       "temperature": 0, "seed": 1234})
        self.assertEqual(200, status, answer)
        choice = answer["choices"][0]
        self.assertEqual("she isyes", choice["text"])
        self.assertEqual(ids_of("s"), self.opened["contexts/c0"])
        columns = choice["logprobs"]
        self.assertEqual(list("she is") + ["y", "e", "s"], columns["tokens"])
        self.assertEqual([None, -0.5, -0.5, -0.5, -0.5, -0.5, -1, -3, -4], columns["token_logprobs"])
        self.assertEqual({"a": -0.25, "i": -0.5}, columns["top_logprobs"][4])
        self.assertEqual({"y": -1, "z": -2}, columns["top_logprobs"][6])
        self.assertEqual(list(range(9)), columns["text_offset"])

    def test_several_prompts_and_samples(self):
        status, answer = self.call("/v1/completions", {"prompt": ["one text here", "other text here"], "n": 2})
        self.assertEqual(200, status, answer)
        self.assertEqual([0, 1, 2, 3], [choice["index"] for choice in answer["choices"]])
        self.assertEqual(1.0, self.request.temperature, "as OpenAI's interface has it")
        self.assertEqual(12, answer["usage"]["completion_tokens"])

    def test_adapts_once_where_asked_to(self):
        self.start({"steps": 8}, question_tokens=4)
        for _ in range(2):
            self.assertEqual(200, self.call("/v1/completions", {"prompt": "a long text who?"})[0])
        self.call("/v1/completions", {"prompt": "a long text who?", "refocus": {"adapt": {"steps": 2}}})
        steps = self.service.named("AdaptContext")
        self.assertEqual([8, 2], [request.steps for request in steps])
        self.assertEqual(1, len(self.opened))
        self.assertEqual(steps[1].adapter_id, self.request.adapter_id)

    def test_conversation(self):
        body = {"messages": [{"role": "system", "content": "be brief"},
                             {"role": "user", "content": [{"type": "text", "text": "a text\nof two lines and a question?"}]},
                             {"role": "assistant", "content": "no"}, {"role": "user", "content": "why?"}],
                "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2,
                "chat_template_kwargs": {"enable_thinking": False}}
        status, answer = self.call("/v1/chat/completions", body)
        self.assertEqual(200, status, answer)
        choice = answer["choices"][0]
        self.assertEqual({"role": "assistant", "content": "yes"}, choice["message"])
        self.assertEqual(["y", "e", "s"], [one["token"] for one in choice["logprobs"]["content"]])
        chat = self.request.chat
        self.assertEqual("a text\nof two lines and a question?",
                         self.opened["contexts/c0"] + chat.earlier[0].question.decode())
        self.assertGreater(len(self.opened["contexts/c0"]), 10)
        self.assertEqual((b"no", b"why?", False, 3, 2), (chat.earlier[0].answer, chat.question, chat.thinking,
                                                        self.request.max_tokens, self.request.logprobs))
        self.assertEqual(b"be brief", self.header.prologue.system)
        self.assertEqual(7, answer["usage"]["prompt_tokens"])

    def test_streams(self):
        status, text = self.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True,
                                                          "stream_options": {"include_usage": True}})
        self.assertEqual(200, status)
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        self.assertEqual("[DONE]", events[-1])
        chunks = [json.loads(event) for event in events[:-1]]
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
        self.assertEqual("yes", said)
        self.assertEqual("length", chunks[-2]["choices"][0]["finish_reason"])
        self.assertEqual(3, chunks[-1]["usage"]["completion_tokens"])
        status, text = self.call("/v1/completions", {"prompt": "a text", "stream": True})
        said = [json.loads(line[6:]) for line in text.split("\n\n") if line and "[DONE]" not in line]
        self.assertEqual("yes", "".join(chunk["choices"][0]["text"] for chunk in said))

    def test_errors_keep_their_kind(self):
        def refuse(code, reason, **more):
            def generate(request, context):
                fail(context, code, reason, "too much", **more)
                yield
            self.service.on["Generate"] = generate
            return self.call("/v1/completions", {"prompt": "a long text who?"})

        status, answer = refuse(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG")
        self.assertEqual((400, "CONTEXT_TOO_LONG"), (status, answer["error"]["param"]))
        status, answer = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_CAPACITY", retry_after=3)
        self.assertEqual((429, "3"), (status, self.headers["Retry-After"]))
        self.assertEqual(503, refuse(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")[0])
        self.assertEqual(500, refuse(grpc.StatusCode.INTERNAL, "NON_FINITE_LOGITS")[0])

        def breaks(request, context):
            yield Event(text="y", token_ids=[24])
            fail(context, grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")

        self.service.on["Generate"] = breaks
        status, text = self.call("/v1/completions", {"prompt": "a long text who?", "stream": True})
        self.assertEqual(200, status)
        self.assertIn("WORKER_LOST", text.split("\n\n")[-2])
        self.assertNotIn("[DONE]", text)

    def test_what_cannot_be_done_is_refused(self):
        ask = {"prompt": "a text who?"}
        for more, word in (({"temperature": "hot"}, "temperature"), ({"n": True}, "n: got True"), ({"suffix": "x"}, "suffix"),
                           ({"best_of": 3}, "best_of"), ({"prompt": []}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
                           ({"prompt": [-1]}, "token ids"), ({"stop": 5}, "stop"), ({"logit_bias": {"a": 1}}, "logit_bias"),
                           ({"max_tokens": 0}, "max_tokens"), ({"guided_json": {}}, "guided_json"),
                           ({"stream": True, "echo": True}, "stream"), ({"refocus": {"adapt": {"stepz": 1}}}, "stepz"),
                           ({"refocus": {"adapt": 3}}, "refocus.adapt"), ({"n": 10**9}, "n: got"), ({"n": 0}, "n: got"),
                           ({"seed": -1}, "seed"), ({"max_tokens": 10**30}, "max_tokens"), ({"prompt": "a\ud800"}, "prompt"),
                           ({"prompt": ""}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": ["a"] * 1025}, "prompt"),
                           ({"stop": "\udfff"}, "stop"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
                           ({"logit_bias": {"1": 10**400}}, "logit_bias")):
            self.refused("/v1/completions", {**ask, **more}, word)
        one = [{"role": "user", "content": "hi"}]
        for body, word in (({}, "messages"), ({"messages": one, "tools": [{}]}, "tools"),
                           ({"messages": one + one}, "messages[1].role"),
                           ({"messages": one + [{"role": "assistant", "content": "a"}]}, "ends with a user"),
                           ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
                           ({"messages": one, "response_format": {"type": "json_object"}}, "response_format")):
            self.refused("/v1/chat/completions", body, word)
        self.assertEqual(400, self.call("/v1/completions", raw="{not json")[0])
        self.assertEqual(400, self.call("/v1/completions", raw="[1]")[0])
        self.assertEqual(400, self.call("/v1/completions", raw="[" * 200_000)[0])
        self.assertEqual(400, self.call("/v1/chat/completions",
                                        {"messages": [{"role": "user", "content": "\ud800"}]})[0])
        self.assertEqual({}, self.opened)

    def test_a_fault_of_the_port_is_still_an_answer(self):
        self.http.port.completion = lambda question: {}["nothing"]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status, answer = self.call("/v1/completions", {"prompt": "a text who?"})
        self.assertEqual((500, "server_error"), (status, answer["error"]["type"]))
        self.assertIn("KeyError", said.getvalue())


if __name__ == "__main__":
    unittest.main()
