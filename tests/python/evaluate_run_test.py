"""The evaluation against a service that is made up: what it asks, what it keeps, how it goes on and how it fails.

Usage: evaluate_run_test.py [unittest arguments], with the installed package on PYTHONPATH.
"""
import contextlib
import html.parser
import io
import json
import math
import os
import pathlib
import re
import tempfile
import threading
import unittest
from unittest import mock

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

import refocus
from fake_server import FakeServer, fail
from refocus.evaluate import __main__ as main
from refocus.evaluate import flops, journal, measure, methods, report, score, service, svg
from refocus.evaluate.item import FORMAT, Item, Question
from refocus.v1 import cluster_pb2, context_pb2, inference_pb2

LAYERS, HEADS = 2, 2
TOKENS = re.compile(r" ?\w+|[^\w]")


class Model:
    """A service whose model finds what a ledger says in its last 30 lines, and everywhere once it was adapted."""

    def __init__(self):
        self.server = FakeServer()
        self.words, self.texts, self.adapted, self.asked = {}, {}, {}, []
        self.symbols = {}  # texts of token ids
        self.lock = threading.Lock()
        self.thinks, self.chat_format, self.broken, self.kind = False, "", {}, None
        self.server.on = {name: getattr(self, name) for name in (
            "GetCluster", "GetModel", "CreateContext", "PrefillContext", "AdaptContext", "DeleteContext", "Generate",
            "Score", "ProbeAttention", "Tokenize")}

    def ids(self, text):
        with self.lock:
            return [self.words.setdefault(piece, len(self.words)) for piece in TOKENS.findall(text)]

    def text(self, ids):
        names = {id: piece for piece, id in self.words.items()}
        return "".join(names.get(id, "?") for id in ids)

    def prompt(self, request):
        if request.HasField("chat"):
            return request.chat.question.decode()
        return request.prompt.text.decode() or self.text(request.prompt.ids.ids)

    def break_at(self, name, request, context):
        """What a test wants to go wrong: broken[name](request) -> arguments of fail, or None."""
        wrong = self.broken.get(name, lambda request: None)(request)
        if wrong:
            fail(context, *wrong)

    def GetCluster(self, request, context):
        return cluster_pb2.GetClusterResponse(state=cluster_pb2.GetClusterResponse.SERVING, version="9.9",
                                              ranks=[cluster_pb2.Rank(device="paper")])

    def GetModel(self, request, context):
        return cluster_pb2.Model(name="made-up", layers=LAYERS, hidden_size=8, query_heads=HEADS, kv_heads=1,
                                 head_dim=4, mlp_size=16, vocab_size=100, max_positions=6000, has_tokenizer=True,
                                 chat_format=self.chat_format, thinks=self.thinks)

    def Tokenize(self, request, context):
        return inference_pb2.TokenizeResponse(ids=self.ids(request.text.decode()))

    def CreateContext(self, requests, context):
        messages = list(requests)
        header = messages[0].header
        data = b"".join(m.chunk.text for m in messages if m.HasField("chunk"))
        ids = [id for m in messages if m.HasField("chunk") for id in m.chunk.ids.ids]
        name = "contexts/" + header.context_id
        user = header.prologue.user.decode() if header.HasField("prologue") else ""
        self.symbols[name] = ids
        self.texts[name] = (user + data.decode(), len(self.ids(user + data.decode())) + len(ids) + 1)  # and a BOS
        self.adapted.pop(name, None)
        self.break_at("CreateContext", header, context)
        return context_pb2.Context(name=name)

    def PrefillContext(self, request, context):
        self.break_at("PrefillContext", request, context)
        tokens = self.texts[request.name][1]
        yield context_pb2.PrefillEvent(context=context_pb2.Context(name=request.name, token_count=tokens),
                                       usage=context_pb2.PhaseUsage(tokens=tokens, seconds=2.0))

    def AdaptContext(self, request, context):
        self.break_at("AdaptContext", request, context)
        event = context_pb2.AdaptEvent
        yield event(effective=event.Effective(steps=request.steps, span_tokens=request.span_tokens, spans_per_step=1,
                                              kind=request.kind if self.kind is None else self.kind))
        yield event(probe_loss_before=2.5)
        for step in range(request.steps):
            yield event(step=event.Step(step=step + 1, loss=2.0 - 0.1 * step))
        yield event(probe_loss_after=2.25)
        self.adapted[request.name] = True
        yield event(adapter=context_pb2.Adapter(id=request.adapter_id, first_loss=2.0, last_loss=1.0),
                    usage=context_pb2.PhaseUsage(seconds=4.0))

    def DeleteContext(self, request, context):
        self.texts.pop(request.name, None)
        return context_pb2.DeleteContextResponse()

    def answer(self, name, adapter, asked, sample):
        number = re.search(r"account ([\w-]+)", asked)
        if number is None:
            return "well"
        lines = self.texts[name][0].splitlines()
        seen = lines if adapter else lines[-30:]
        found = [line for line in seen if line.startswith(f"Account {number.group(1)} holds")]
        return (" " + found[0].split()[-1] if found else " nothing") if sample % 3 != 1 else " otherwise"

    def Generate(self, request, context):
        self.break_at("Generate", request, context)
        asked = self.prompt(request)
        with self.lock:
            self.asked.append((request, asked))
        if request.prompt_logprobs:
            yield self.read_along(self.symbols[request.name], request)
            return
        for sample in range(max(1, request.n)):
            said = " I look. Final" if asked.endswith("Scratchpad:") else self.answer(request.name, request.adapter_id,
                                                                                      asked, sample)
            ids = self.ids(said)
            yield inference_pb2.GenerateEvent(
                text=said, token_ids=ids, sample=sample,
                logprobs=[inference_pb2.TokenLogprob(id=id, logprob=-1.0 - sample) for id in ids])
            yield inference_pb2.GenerateEvent(sample=sample, summary=inference_pb2.GenerateSummary(
                generated_tokens=33 if request.ignore_eos else len(ids), prompt_tokens=len(self.ids(asked)),
                prompt_seconds=0.5, decode_seconds=0.25))

    @staticmethod
    def read_along(text, request):
        """Of pairs: finds values in the last 100 tokens, and everywhere once it was adapted."""
        asked = list(request.prompt.ids.ids)
        best = []
        for row in range(len(asked)):
            before = text + asked[:row]
            seen = before if request.adapter_id else before[-100 - len(before) % 2:]
            held = dict(zip(seen[-len(seen) // 2 * 2::2], seen[1::2])) if row % 2 else {}
            best.append(inference_pb2.TokenLogprob(id=held.get(asked[row - 1], 1)))
        return inference_pb2.GenerateEvent(
            token_ids=[1], prompt_logprobs=[-0.5] * len(asked), prompt_best=best if request.logprobs else [],
            summary=inference_pb2.GenerateSummary(generated_tokens=1, prompt_tokens=len(asked), prompt_seconds=0.5))

    def Score(self, requests, context):
        for request in requests:
            yield inference_pb2.ScoreEvent(target_id=request.target_id, sum_logprob=-3.0 * len(request.target.ids.ids),
                                           token_count=len(request.target.ids.ids))

    def ProbeAttention(self, request, context):
        """The logit of a key is 0.9 times its position modulo 7."""
        tokens = self.texts[request.name][1]
        total = sum(math.exp(key % 7 * 0.9) for key in range(tokens))
        mass = [sum(math.exp(key % 7 * 0.9) for key in range(r.begin, r.end)) / total for r in request.ranges]
        heads = 1 if request.mean_over_heads else HEADS
        rows = 1 if request.mean_over_rows else len(request.positions)
        for layer in range(LAYERS):
            yield inference_pb2.ProbeAttentionEvent(
                layer=layer, row_count=rows, positions=[] if request.mean_over_rows else request.positions,
                mass=[value for _ in range(rows) for value in mass for _ in range(heads)])
        yield inference_pb2.ProbeAttentionEvent(summary=inference_pb2.ProbeAttentionSummary(
            layers=range(LAYERS), heads=range(HEADS)))


class Base(unittest.TestCase):
    def setUp(self):
        self.model = Model()
        self.folder = tempfile.TemporaryDirectory()
        self.out = os.path.join(self.folder.name, "out")

    def tearDown(self):
        self.model.server.stop()
        self.folder.cleanup()

    def command(self, *arguments):
        """Exit code, standard output and error."""
        output, error = io.StringIO(), io.StringIO()
        quick = refocus.RetryPolicy(attempts=2, first_delay=0.01)
        real = refocus.Client
        client = lambda address: real(address, retry=quick, timeout=10, read_timeout=2)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error), \
                mock.patch.object(main.refocus, "Client", client):
            try:
                code = main.main([*arguments])
            except SystemExit as exit:
                code = exit.code
        return code, output.getvalue(), error.getvalue()

    def run_eval(self, *arguments, tasks="ledger", lengths="600,2000", methods="in-context,qttt:steps=3,no-context"):
        return self.command("run", "--address", self.model.server.address, "--tasks", tasks, "--lengths", lengths,
                            "--methods", methods, "--out", self.out, "--seeds", "0-1", *arguments)

    def records(self, kind="answer"):
        found, _ = journal.read(os.path.join(self.out, "journal.jsonl"))
        return [record for record in found if record["kind"] == kind]


class Runs(Base):
    def test_everything_is_asked_and_scored(self):
        code, output, error = self.run_eval()
        self.assertEqual(0, code, error)
        answers = self.records()
        self.assertEqual(2 * 2 * 3 * 8, len(answers))
        by = lambda method, length: [r["score"] for r in answers if r["method"] == method and r["length"] == length]
        self.assertEqual([1.0] * 16, by("qttt:steps=3", 2000))
        self.assertLess(sum(by("in-context", 2000)), 12)
        self.assertEqual([0.0] * 16, by("no-context", 2000))
        self.assertEqual({}, self.model.texts, "every context is deleted")
        self.assertRegex(output, r"ledger +2,0\d\d|1,9\d\d  qttt:steps=3 +16  100.0 \(")
        self.assertIn("[12/12] ledger-2000-1 no-context: 0 of 8", error)
        adapt = self.records("adapt")
        self.assertEqual(4, len(adapt))
        shape = flops.Shape(2, 8, 2, 1, 4, 16, 100)
        tokens = adapt[0]["context_tokens"]
        self.assertEqual(flops.adapt(shape, tokens, 3, 128) + 2 * flops.probe(shape, tokens, 256), adapt[0]["flops"])
        self.assertEqual((2.5, 2.25, [2.0, 1.9, 1.8], 4.0), tuple(
            adapt[0][name] for name in ("probe_before", "probe_after", "losses", "seconds")))

    def test_seeds_are_shared_by_methods(self):
        self.run_eval(methods="qttt:steps=1,qttt-lora:steps=1,self-consistency:n=2,best-of-n:n=2", lengths="600")
        seeds = {}
        for request, asked in self.model.asked:
            seeds.setdefault((request.name, asked), set()).add(request.seed if request.n else None)
        self.assertEqual({2}, {len(found) for found in seeds.values()}, "greedy ones, and one seed for all that draw")
        adapts = self.model.server.named("AdaptContext")
        self.assertEqual(2, len({request.seed for request in adapts}), "one for each text")
        self.assertEqual({context_pb2.FULL, context_pb2.LORA}, {request.kind for request in adapts})

    def test_an_interrupted_run_goes_on(self):
        calls = []

        def gone(request):
            calls.append(request)
            return (grpc.StatusCode.UNAVAILABLE, "DRAINING", "the service drains") if len(calls) > 30 else None

        self.model.broken["Generate"] = gone
        code, _, error = self.run_eval()
        self.assertEqual(1, code)
        self.assertEqual(1, error.count("refocus eval: "))
        self.assertIn("the service drains [DRAINING]; what was answered is kept", error)
        kept = self.records()
        self.assertEqual(30, len(kept))
        with open(os.path.join(self.out, "journal.jsonl"), "a") as file:
            file.write('{"kind": "answer", "item": "cut o')  # a crash in the middle of a line
        self.model.broken.clear()
        self.model.asked.clear()
        code, _, error = self.run_eval()
        self.assertEqual(0, code, error)
        self.assertEqual(kept, self.records()[:30])
        self.assertEqual(96, len(self.records()))
        self.assertEqual(96, len({journal.key_of(record) for record in self.records()}))
        self.assertEqual(66, len(self.model.asked))

        self.model.asked.clear()
        self.assertEqual(0, self.run_eval()[0])
        self.assertEqual([], self.model.asked, "nothing is done twice")

    def test_lost_keys_and_values_are_computed_again(self):
        calls = []

        def lost(request):
            calls.append(request)
            return (grpc.StatusCode.FAILED_PRECONDITION, "CONTEXT_NOT_READY") if len(calls) == 5 else None

        self.model.broken["Generate"] = lost
        code, _, error = self.run_eval(lengths="600", methods="in-context")
        self.assertEqual(0, code, error)
        self.assertIn("opening it again", error)
        self.assertEqual(16, len(self.records()))
        self.model.broken["Generate"] = lambda request: (grpc.StatusCode.FAILED_PRECONDITION, "CONTEXT_NOT_READY")
        code, _, error = self.run_eval(lengths="700", methods="in-context")
        self.assertEqual(2, code)
        self.assertIn("were lost 3 times", error)

    def test_what_the_service_lacks_stops_nothing_else(self):
        self.model.broken["AdaptContext"] = lambda request: (
            grpc.StatusCode.UNIMPLEMENTED, "NO_ADAPTING", "adapting: got a request, allowed none here")
        code, output, error = self.run_eval(lengths="600")
        self.assertEqual(1, code)
        self.assertEqual(1, error.count("adapting: got a request"), "said once")
        self.assertEqual(32, len(self.records()))
        self.assertIn("no-context", output)
        self.assertIn("adapting: got a request", pathlib.Path(self.out, "report.html").read_text())
        self.model.broken.clear()
        self.assertEqual(0, self.run_eval(lengths="600")[0], "later it can")
        self.assertNotIn("adapting: got a request", pathlib.Path(self.out, "report.html").read_text())

    def test_lora_that_the_service_ignores(self):
        self.model.kind = 0
        code, _, error = self.run_eval(lengths="600", methods="qttt-lora:steps=1")
        self.assertEqual(2, code)
        self.assertIn("method qttt-lora:steps=1: the service adapts full matrices only", error)

    def test_refused_before_anything_is_asked(self):
        for arguments, message in (
                ({"lengths": "7000"}, "got a text of 7000 tokens, allowed 6000"),
                ({"methods": "thinking:budget=5500"}, "2000 tokens and 5500 of thinking, allowed 6000"),
                ({"methods": "guessing"}, "the method 'guessing', allowed in-context"),
                ({"tasks": "ledgers"}, "the task 'ledgers', allowed ledger"),
                ({"tasks": "none.jsonl"}, "none.jsonl: cannot read"),
                ({"tasks": "ledger,vt", "lengths": "900,50"}, "vt: got a length of 50 tokens, allowed at least"),
                ({"lengths": "ten"}, "--lengths: got 'ten'")):
            code, _, error = self.run_eval(**arguments)
            self.assertEqual(2, code, error)
            self.assertEqual(1, len(error.splitlines()), error)
            self.assertIn(message, error)
        self.assertEqual([], self.model.asked)

    def test_nobody_listens(self):
        self.model.server.stop()
        code, _, error = self.run_eval()
        self.assertEqual(1, code)
        self.assertEqual(1, len(error.splitlines()), error)

    def test_another_model_s_journal(self):
        self.assertEqual(0, self.run_eval(lengths="600", methods="in-context")[0])
        code, _, error = self.run_eval("--questions", "3", lengths="600", methods="in-context")
        self.assertEqual(2, code)
        self.assertIn("name another folder with --out", error)
        path = pathlib.Path(self.out, "journal.jsonl")
        path.write_text("{}\n" + path.read_text())
        code, _, error = self.run_eval(lengths="600", methods="in-context")
        self.assertIn("journal.jsonl:1: got no record of a run", error)

    def test_a_file_of_tasks(self):
        path = os.path.join(self.folder.name, "mine.jsonl")
        code, output, _ = self.command("make", "--address", self.model.server.address, "--tasks", "ledger", "--lengths",
                                       "600", "--out", path)
        self.assertEqual((0, f"{path}: 1 texts, 8 questions\n"), (code, output))
        self.assertEqual(0, self.run_eval(tasks=path, methods="qttt:steps=1")[0])
        self.assertEqual([1.0] * 8, [record["score"] for record in self.records()])

    def test_questions_side_by_side(self):
        self.assertEqual(0, self.run_eval("--parallel", "4", lengths="600", methods="in-context")[0])
        self.assertEqual(16, len(self.records()))


class Ways(Base):
    def one(self, method, **model):
        for name, value in model.items():
            setattr(self.model, name, value)
        code, _, error = self.run_eval("--questions", "1", "--seeds", "0", methods=method, lengths="200")
        self.assertEqual(0, code, error)
        return self.records()[0]

    def test_a_majority(self):
        record = self.one("self-consistency:n=5")
        self.assertEqual(1.0, record["score"])
        self.assertEqual(2, sum("otherwise" in sample for sample in record["samples"]))
        request = self.model.asked[-1][0]
        self.assertEqual((5, 0.7, 20), (request.n, round(request.temperature, 3), request.top_k))
        self.assertEqual((0.5, 0.25), (record["seconds"]["prompt"], record["seconds"]["decode"]), "side by side")
        self.assertEqual(3 * 2 + 2 * 1, record["tokens"]["generated"])

    def test_the_most_likely(self):
        record = self.one("best-of-n:n=2")
        self.assertEqual(record["samples"][0], record["answer"], "its tokens have the largest mean log-probability")

    def test_a_scratchpad_keeps_its_budget(self):
        record = self.one("thinking:budget=77")
        (first, asked), (second, finished) = self.model.asked[-2:]
        self.assertEqual((77, ["Final:"]), (first.max_tokens, list(first.stop)))
        self.assertTrue(asked.endswith("Scratchpad:") and "Answer:" not in asked)
        self.assertEqual(asked + " I look. Final\nFinal:", finished)
        self.assertEqual((16, 1.0), (second.max_tokens, record["score"]))
        self.assertEqual((0.5, 1.0), (record["seconds"]["decode"], record["seconds"]["prompt"]), "one after the other")
        self.assertAlmostEqual(0.6, first.temperature)

    def test_a_model_that_thinks(self):
        record = self.one("thinking:budget=77", thinks=True, chat_format="chatml")
        request = self.model.asked[-1][0]
        self.assertEqual((True, 77, 93), (request.chat.thinking, request.chat.thinking_budget, request.max_tokens))
        self.assertEqual(1.0, record["score"])

    def test_and_does_not(self):
        self.one("in-context", thinks=True, chat_format="chatml")
        request = self.model.asked[-1][0]
        self.assertTrue(request.chat.HasField("thinking"))
        self.assertFalse(request.chat.thinking)

    def test_a_conversation(self):
        self.one("in-context", chat_format="chatml")
        header = self.model.server.named("CreateContext")[-1][0].header
        self.assertTrue(header.prologue.user.startswith(b"The ledger below"))
        self.assertFalse(self.model.asked[-1][0].chat.HasField("thinking"), "the template's default")

    def test_the_cost_of_an_adaptation_in_operations(self):
        self.run_eval("--questions", "1", "--seeds", "0", lengths="2000", methods="thinking:match=flops,qttt:steps=8")
        thinking = next(record for record in self.records() if record["method"].startswith("thinking"))
        adapt, = self.records("adapt")
        shape = flops.Shape(2, 8, 2, 1, 4, 16, 100)
        context = thinking["tokens"]["context"]
        budget = thinking["tokens"]["budget"]
        self.assertLessEqual(flops.decode(shape, context, budget), adapt["flops"])
        self.assertGreater(flops.decode(shape, context, budget + 1), adapt["flops"])

    def test_and_in_seconds(self):
        """4 s of adapting, 32 tokens in 0.25 s."""
        self.run_eval("--questions", "1", "--seeds", "0", lengths="600", methods="thinking:match=time,qttt:steps=1")
        thinking = next(record for record in self.records() if record["method"].startswith("thinking"))
        self.assertEqual(512, thinking["tokens"]["budget"])

    def test_token_ids(self):
        code, _, error = self.run_eval("--questions", "2", "--seeds", "0", tasks="symbols", lengths="600",
                                       methods="in-context,no-context")
        self.assertEqual(0, code, error)
        chunks = [m.chunk.ids.ids for messages in self.model.server.named("CreateContext") for m in messages
                  if m.HasField("chunk")]
        self.assertEqual([600, 1], [len(ids) for ids in chunks], "the floor has one token")


    def test_later_tokens_are_read_along(self):
        code, output, error = self.run_eval("--seeds", "0", "--later", "300", tasks="symbols-later", lengths="1200",
                                            methods="in-context,qttt:steps=2,no-context")
        self.assertEqual(0, code, error)
        plain, adapted, floor = self.records()
        count = len(plain["references"])
        self.assertEqual(1.0, adapted["score"])
        self.assertLess(plain["score"], 0.5)
        self.assertGreaterEqual(plain["score"], floor["score"])
        self.assertEqual((0.5, 300, 1), (plain["target_nats"], plain["tokens"]["prompt"], plain["tokens"]["generated"]))
        self.assertEqual(3, len(self.model.asked), "one call for all of a text")
        request = self.model.asked[0][0]
        self.assertEqual((1, True, 1), (request.max_tokens, request.prompt_logprobs, request.logprobs))
        self.assertRegex(output, rf"symbols-later +1,201  qttt:steps=2 +{count}  100.0 \(97 to 100\)")
        self.assertIn(f"qttt:steps=2: {count} of {count}", error)
        row = next(json.loads(line) for line in pathlib.Path(self.out, "summary.jsonl").open()
                   if '"qttt:steps=2"' in line)
        right = sum(a == str(b) for a, b in zip(plain["answer"].split(), plain["references"]))
        self.assertAlmostEqual((count - right) / count, row["versus"][0])

    def test_later_tokens_are_not_drawn(self):
        code, _, error = self.run_eval("--seeds", "0", tasks="symbols-later", lengths="600", methods="best-of-n")
        self.assertEqual(2, code)
        self.assertIn("method best-of-n: got tokens to read along, allowed methods that draw nothing", error)


class Benchmarks(Base):
    def setUp(self):
        super().setUp()
        self.model.server.on["Detokenize"] = lambda request, context: inference_pb2.DetokenizeResponse(
            text=self.model.text(request.ids))

    def test_from_files_to_predictions(self):
        row = {"_id": "1", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": "Q?",
               "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d", "answer": "B",
               "context": "word " * 3000}
        path = os.path.join(self.folder.name, "data.json")
        pathlib.Path(path).write_text(json.dumps([row]))
        self.model.answer = lambda name, adapter, asked, sample: (
            "The correct answer is (B)" if "</text>" in asked else "The correct answer is (C)")
        code, output, error = self.run_eval("--limit", "1128", tasks=f"longbench2:{path}",
                                            methods="in-context,no-context,qttt:steps=1")
        self.assertEqual(0, code, error)
        scores = json.loads(pathlib.Path(self.out, "predictions", "scores.json").read_text())["longbench2"]
        self.assertEqual({"in-context": 100.0, "no-context": 0.0, "qttt:steps=1": 100.0},
                         {method: found["Overall"] for method, found in scores.items()})
        self.assertIn('"Overall": 100.0', output)
        line = json.loads(pathlib.Path(self.out, "predictions/longbench2/qttt_steps=1/results.jsonl").read_text())
        self.assertEqual(("B", True), (line["pred"], line["judge"]))
        self.assertEqual({0.1}, {round(request.temperature, 6) for request, _ in self.model.asked})
        floor = next(asked for request, asked in self.model.asked if "</text>" not in asked)
        self.assertTrue(floor.startswith("What is the correct answer to this question: Q?"))
        texts = [b"".join(m.chunk.text for m in messages if m.HasField("chunk")).decode()
                 for messages in self.model.server.named("CreateContext")]
        self.assertIn("\n", texts, "the floor's own prompt stands alone")
        long = next(text for text in texts if text != "\n")
        question = next(asked for request, asked in self.model.asked if "</text>" in asked)
        self.assertEqual(1000, len(TOKENS.findall(long + question)))

    def test_a_benchmark_that_is_not_there(self):
        code, _, error = self.run_eval(tasks="ruler:/nowhere", methods="in-context")
        self.assertEqual((2, 1), (code, len(error.splitlines())))
        self.assertIn("github.com/NVIDIA/RULER", error)
        code, _, error = self.run_eval("--limit", "9000", tasks="ruler:/nowhere", methods="in-context")
        self.assertIn("--limit: got 9000, allowed 256 to 6000", error)


class Measures(Base):
    def test_evidence_and_rivals(self):
        self.assertEqual(0, self.run_eval("--seeds", "0", "--measure", "1", lengths="600", methods="in-context")[0])
        looked = [record for record in self.records() if "attention" in record]
        self.assertEqual(1, len(looked))
        record = looked[0]
        self.assertEqual(3.0, record["target_nats"])
        # Where the evidence stands, found again from the text that was sent.
        text, number = None, record["question"]
        for messages in self.model.server.named("CreateContext"):
            text = b"".join(m.chunk.text for m in messages if m.HasField("chunk")).decode()
        pieces = TOKENS.findall(text)
        line = f"Account {number} holds {record['references'][0]}."
        first = len(TOKENS.findall(text[:text.index(line)]))
        keys = range(first + 1, first + 1 + len(TOKENS.findall(line)))  # behind the BOS
        total = sum(math.exp(key % 7 * 0.9) for key in range(len(pieces) + 1))
        expected = sum(math.exp(key % 7 * 0.9) for key in keys) / total
        self.assertAlmostEqual(expected, record["attention"]["mass"][0], places=5)
        self.assertEqual(len(keys), record["evidence_tokens"])
        # The rows that predict the reference: the question's last token, and all of the reference but its last.
        probe = next(r for r in self.model.server.named("ProbeAttention") if r.mean_over_rows)
        asked = self.model.asked[0][1]
        self.assertEqual([len(pieces) + 1 + len(TOKENS.findall(asked)) - 1], list(probe.positions))
        # Of all other keys, those so near to the best of these; a sample of 224.
        best = max(key % 7 * 0.9 for key in keys)
        others = [key % 7 * 0.9 for key in range(len(pieces) + 1) if key not in keys]
        for delta, found in zip((1, 2, 4), record["rivals"]["mean"]):
            exact = sum(logit >= best - delta for logit in others)
            self.assertAlmostEqual(exact, found, delta=0.1 * len(others))
        self.assertEqual(len(others), record["rivals"]["of"])
        self.assertEqual(224, record["rivals"]["sampled"])

    def test_counting_rivals(self):
        top = 0.5
        others = [top * math.exp(-0.99), top * math.exp(-1.01), top * math.exp(-3.9), 0.0, top]
        self.assertEqual([2, 3, 4], measure.counts([0.1, top], others))


class Strict(html.parser.HTMLParser):
    """Every element that needs an end has one, in order; nothing comes from outside."""

    VOID = {"meta", "br", "line", "circle", "rect", "polyline"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID or tag == "circle" or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


class Reports(Base):
    def test_page_and_tables(self):
        self.assertEqual(0, self.run_eval(methods="in-context,qttt:steps=3,no-context,thinking:match=flops")[0])
        page = pathlib.Path(self.out, "report.html").read_text()
        parser = Strict()
        parser.feed(page)
        self.assertEqual([], parser.open)
        for tag, attributes in parser.seen:
            self.assertFalse({"src", "href"} & set(attributes), (tag, attributes))
        self.assertNotRegex(re.sub(r'xmlns="[^"]*"', "", page), r"https?://|@import|url\(")
        self.assertNotIn("nan", re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower().replace("answer", ""))
        for words in ("Right answers", "Where the time goes", "Where the attention goes", "held-out spans",
                      "qttt:steps=3"):
            self.assertIn(words, page)
        curves = re.findall(r'<polyline class="curve s1" points="([^"]+)"', page)
        self.assertEqual(2, len(curves[0].split()), "two lengths")
        rows = pathlib.Path(self.out, "results.csv").read_text().splitlines()
        self.assertEqual(1 + 2 * 4, len(rows))
        summary = [json.loads(line) for line in pathlib.Path(self.out, "summary.jsonl").read_text().splitlines()]
        gain = next(row for row in summary if row["method"] == "qttt:steps=3" and row["length"] == 2000)
        self.assertEqual(1.0, gain["score"])
        self.assertGreater(gain["versus"][1], 0, "paired, so the interval leaves out zero")
        self.assertAlmostEqual(4.0, gain["seconds"]["adapt"])

    def test_again_without_a_service(self):
        self.assertEqual(0, self.run_eval(lengths="600")[0])
        self.model.server.stop()
        os.remove(os.path.join(self.out, "report.html"))
        code, output, _ = self.command("report", self.out)
        self.assertEqual(0, code)
        self.assertIn("qttt:steps=3", output)
        self.assertTrue(os.path.exists(os.path.join(self.out, "report.html")))
        code, _, error = self.command("report", self.folder.name)
        self.assertEqual(2, code)
        self.assertIn("journal.jsonl: cannot read", error)

    def test_names_are_escaped(self):
        self.assertEqual("&lt;b&gt;&quot;", svg.text('<b>"'))
        row = svg.bars([("<script>", [("a", 0, 1.0)])], "s")
        self.assertNotIn("<script>", row)

    def test_plots_of_little(self):
        self.assertEqual("", svg.lines([], "x", "y"))
        self.assertIn("<svg", svg.lines([svg.Series("a", 0, [svg.Point(0, 0)])], "x", "y"))
        self.assertIn("<svg", svg.lines([svg.Series("a", 0, [svg.Point(1, 0), svg.Point(5, 3)])], "x", "y", log_y=True))
        self.assertEqual([0, 0.2, 0.4, 0.6, 0.8, 1.0], svg.ticks(0, 1))
        self.assertEqual(["0.00", "0.0052", "0.099", "0.10", "2.35"], [
            svg.seconds(value) for value in (0, 0.00517, 0.099, 0.0999, 2.345001)])
        self.assertEqual([1000, 1500, 2000, 2500, 3000], svg.ticks(1000, 3000))


if __name__ == "__main__":
    unittest.main()
