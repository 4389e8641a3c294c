"""The package against a real service on the CPU: a small model with random weights, tokenizer and reasoning of its own.

Usage: service_test.py BIN_FOLDER REPOSITORY [unittest arguments], with the installed package on PYTHONPATH.
"""
import asyncio
import contextlib
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
import unittest

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
BIN, ROOT = map(pathlib.Path, sys.argv[1:3])
del sys.argv[1:3]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
import harness  # noqa: E402
import refocus  # noqa: E402
from refocus.evaluate import __main__ as evaluate  # noqa: E402
from refocus.evaluate import journal, tasks  # noqa: E402
from refocus.v1 import context_pb2  # noqa: E402

TEXT = "Account gentle-otter holds lantern. Account brave-heron holds anchor. " * 12
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
          "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
          "hidden_act": "silu", "torch_dtype": "float32", "eos_token_id": 2}

# As much of Qwen3's templates as tells them apart: reasoning may be switched off; the answer begins with reasoning.
MAY_THINK = "<|im_start|>assistant<|im_end|>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
MUST_THINK = "<|im_start|>user<|im_end|>{{ '<|im_start|>assistant\n<think>\n' }}"


def write_model(folder, template):
    """Shapes and a tokenizer with Qwen3's markers of reasoning; the weights come from a seed."""
    tokenizer = json.loads((ROOT / "tests" / "tokenizer" / "smollm" / "tokenizer.json").read_text())
    known = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    for number, marker in enumerate(("<think>", "</think>"), max(known) + 1):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": marker})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": max(known) + 3}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


class Real(unittest.TestCase):
    template = MAY_THINK

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        model = pathlib.Path(cls.folder.name)
        write_model(model, cls.template)
        cls.service = harness.Service(BIN, model, 2, "--threads-per-rank", "1", "--random-weights", "3",
                                      kv_memory="100MB")
        cls.enterClassContext(cls.service)
        cls.client = refocus.Client(cls.service.address)
        cls.addClassCleanup(cls.client.close)

    def tearDown(self):
        for context in self.client.contexts():
            self.client.context(context.name).delete(force=True)

    def path(self, name):
        return pathlib.Path(self.folder.name) / name


class Threads:
    def on(self, context, ask):
        return ask(context)


class Asyncio:
    def on(self, context, ask):
        async def run():
            async with refocus.aio.Client(self.service.address) as client:
                return await ask(client.context(context.name))
        return asyncio.run(run())


class Adapters:
    """Files of adapters, there and back."""

    def setUp(self):
        self.context = self.client.create(TEXT)
        self.made = self.context.adapt("made", steps=3, span_tokens=16, learning_rate=1e-2,
                                       max_probe_rise=100.0).adapter
        self.answer = self.logprobs(self.context, "made")
        self.assertNotEqual(self.answer, self.logprobs(self.context, ""), "the adapter changes nothing")

    def logprobs(self, context, adapter):
        return context.score([" holds"], adapter=adapter)[0].sum_logprob

    def test_to_a_file_and_back(self):
        path = self.path("made.adapter")
        seen = []
        self.on(self.context, lambda context: context.export_adapter(path, "made", on_progress=seen.append))
        size = path.stat().st_size
        self.assertEqual(("export", size, size), (seen[-1].phase, seen[-1].done, seen[-1].total))
        self.service.call("adapter", "export", self.context.name, "made", self.path("cli.adapter"))
        self.assertEqual(self.path("cli.adapter").read_bytes(), path.read_bytes())
        self.assertFalse(self.path("made.adapter.part").exists())
        other = self.client.create(TEXT)
        seen.clear()
        for source in (path, str(path)):
            adapter = self.on(other, lambda context: context.import_adapter(source, on_progress=seen.append))
        self.assertEqual(("made", 2, True, self.made.delta_hash, 3),
                         (adapter.id, adapter.revision, adapter.imported, adapter.delta_hash, adapter.steps))
        self.assertEqual(("import", size, size), (seen[-1].phase, seen[-1].done, seen[-1].total))
        self.assertEqual(self.answer, self.logprobs(other, "made"))

    def test_in_memory(self):
        data = self.on(self.context, lambda context: context.adapter_bytes("made"))
        self.assertEqual(b"RFKADPT1", data[:8])
        for number, source in enumerate((data, io.BytesIO(data)), 1):
            adapter = self.on(self.context, lambda context: context.import_adapter(source, "copy"))
            self.assertEqual(("copy", number), (adapter.id, adapter.revision))
        self.assertEqual(self.answer, self.logprobs(self.context, "copy"))
        self.on(self.context, lambda context: context.delete_adapter("copy"))  # right behind its answer
        self.assertEqual(["made"], [adapter.id for adapter in self.context.info().adapters])

    def test_what_is_broken_changes_nothing(self):
        data = self.context.adapter_bytes("made")
        broken = bytearray(data)
        broken[-100] ^= 1
        path = self.path("kept")
        path.write_bytes(b"what was there")
        with self.assertRaises(refocus.DataLossError) as caught:
            self.on(self.context, lambda context: context.import_adapter(bytes(broken), "copy"))
        self.assertEqual("CHECKSUM_MISMATCH", caught.exception.reason)
        with self.assertRaises(refocus.DataLossError) as caught:
            self.on(self.context, lambda context: context.import_adapter(data[:-1], "copy"))
        self.assertEqual("ADAPTER_FILE_INVALID", caught.exception.reason)
        with self.assertRaises(refocus.NotFoundError):
            self.on(self.context, lambda context: context.export_adapter(path, "nobody"))
        self.assertEqual(b"what was there", path.read_bytes())
        self.assertFalse(self.path("kept.part").exists())
        with self.assertRaises(FileNotFoundError):
            self.on(self.context, lambda context: context.export_adapter(self.path("no/such/folder"), "made"))
        with self.assertRaises(FileNotFoundError):
            self.on(self.context, lambda context: context.import_adapter(self.path("no-such-file")))
        self.assertEqual(["made"], [adapter.id for adapter in self.context.info().adapters])

    def test_of_another_model(self):
        data = self.context.adapter_bytes("made")
        header = data.find(self.fingerprint())
        self.assertGreater(header, 0)
        foreign = data[:header] + b"0" * 16 + data[header + 16:-32]
        foreign += hashlib.sha256(foreign).digest()
        with self.assertRaises(refocus.InvalidArgumentError) as caught:
            self.on(self.context, lambda context: context.import_adapter(foreign, "copy"))
        self.assertEqual("MODEL_MISMATCH", caught.exception.reason)
        self.on(self.context, lambda context: context.import_adapter(foreign, "copy", allow_other_model=True))
        self.assertEqual(self.answer, self.logprobs(self.context, "copy"))

    def fingerprint(self):
        header = refocus.v1.context_pb2.AdapterFileHeader
        data = self.context.adapter_bytes("made")
        size = int.from_bytes(data[8:12], "little")
        return header.FromString(data[12:12 + size]).model_fingerprint.encode()


class ThreadsAdapters(Threads, Adapters, Real):
    pass


class AsyncioAdapters(Asyncio, Adapters, Real):
    pass


class Evaluation(Real):
    """Every way of answering, as the evaluation asks for it. What a random model says is never right; what was asked,
    drawn, counted and chosen is checked."""

    def run_eval(self, methods, *arguments, fails=""):
        out = tempfile.mkdtemp(dir=self.folder.name)
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = evaluate.main(["run", "--address", self.service.address, "--tasks", "ledger", "--lengths", "600",
                                  "--seeds", "0", "--questions", "2", "--methods", methods, "--out", out, *arguments])
        self.assertEqual(2 if fails else 0, code, output.getvalue())
        self.assertIn(fails, output.getvalue())
        if fails:
            return []
        self.assertTrue(os.path.exists(os.path.join(out, "report.html")))
        records, _ = journal.read(os.path.join(out, "journal.jsonl"))
        self.assertEqual([], [record for record in records if record["kind"] == "error"])
        answers = [record for record in records if record["kind"] == "answer"]
        self.assertEqual(2, len(answers), output.getvalue())
        return answers


class Surprisal(unittest.TestCase):
    """Spans by their loss, with the recall model, whose losses differ from span to span: late accounts are known."""

    ROWS, STEPS = 64, 4

    def look(self, ranks):
        ids = tasks.make("symbols", 1536, 3, tasks.Settings(lambda text: [])).text
        with harness.Service(BIN, ROOT / "bench" / "recall_model" / "model", ranks, "--threads-per-rank", "1",
                             kv_memory="200MB") as service, refocus.Client(service.address) as client:
            context = client.create(ids)
            done = context.adapt(steps=self.STEPS, span_tokens=self.ROWS, learning_rate=1e-4, seed=4,
                                 surprisal_spans=context_pb2.AdaptContextRequest.SurprisalSpans())
            candidates = done.candidates
            self.assertEqual(4 * self.STEPS, len(candidates.starts))
            self.assertEqual(4 * self.STEPS, done.effective.candidates)
            self.assertEqual((4 + 1) * self.STEPS * self.ROWS, done.usage.tokens)
            # What the base queries say of the same rows, by the way of a question.
            for start, loss in zip(candidates.starts, candidates.losses):
                before = client.create(ids[:start + 1])
                score, = before.score([ids[start + 1:start + 1 + self.ROWS]])
                self.assertAlmostEqual(-score.sum_logprob / self.ROWS, loss, delta=2e-3)
                before.delete()
            again = context.adapt("again", steps=self.STEPS, span_tokens=self.ROWS, learning_rate=1e-4, seed=4,
                                  base_adapter="default",
                                  surprisal_spans=context_pb2.AdaptContextRequest.SurprisalSpans()).candidates
            self.assertEqual(list(candidates.starts), list(again.starts))
            self.assertNotEqual(list(candidates.losses), list(again.losses), "of the queries that it starts from")
        order = sorted(range(len(candidates.losses)), key=lambda i: -candidates.losses[i])
        self.assertEqual(sorted(order[:self.STEPS]), [i for i, chosen in enumerate(candidates.chosen) if chosen])
        trained = [start for step in done.steps for start in step.span_starts]
        self.assertEqual(sorted(candidates.starts[i] for i in order[:self.STEPS]), sorted(trained))
        return trained, list(candidates.losses)

    def test_those_of_the_largest_loss_on_one_and_two_ranks(self):
        (one, losses), (two, others) = self.look(1), self.look(2)
        self.assertEqual(one, two)
        for loss, other in zip(losses, others):
            self.assertAlmostEqual(loss, other, delta=1e-4)


class Behind(unittest.TestCase):
    """Rows read again behind the text, with the recall model: they are questions, and train for questions."""

    def look(self, ranks):
        ledger = tasks.make("symbols", 1024, 5, tasks.Settings(lambda text: []))
        with harness.Service(BIN, ROOT / "bench" / "recall_model" / "model", ranks, "--threads-per-rank", "1",
                             kv_memory="200MB") as service, refocus.Client(service.address) as client:
            context = client.create(ledger.text)
            recall = context_pb2.AdaptContextRequest.RecallRows()
            # All at the first place behind the text: where a question's first token stands.
            once = context.adapt("once", steps=1, span_tokens=32, learning_rate=0, behind=1, recall_rows=recall, seed=2)
            step, = once.steps
            self.assertEqual(32, len(step.span_starts))
            scores = [context.score([[ledger.text[row + 1]]], prompt=[ledger.text[row]])[0].sum_logprob
                      for row in step.span_starts]
            self.assertAlmostEqual(-sum(scores) / len(scores), step.loss, delta=2e-3)
            done = context.adapt("asked", steps=64, span_tokens=32, learning_rate=4e-3, behind=64, recall_rows=recall,
                                 seed=2, schedule=context_pb2.COSINE)
            self.assertLess(done.probe_loss_after, 0.5 * done.probe_loss_before)
            with self.assertRaisesRegex(refocus.RefocusError, "behind"):
                context.adapt("far", steps=1, behind=1 << 20)
        return [step.loss for step in once.steps + done.steps]

    def test_on_one_and_two_ranks(self):
        one, two = self.look(1), self.look(2)
        self.assertEqual(65, len(one))
        for loss, other in zip(one[:9], two[:9]):  # later ones drift apart with the rounding
            self.assertAlmostEqual(loss, other, delta=1e-3)


class Thinking(Evaluation):
    template = MUST_THINK

    def test_native(self):
        self.assertTrue(self.client.model().thinks)
        for record in self.run_eval("thinking:budget=12"):
            tokens = record["tokens"]
            self.assertEqual(12, tokens["budget"])
            self.assertEqual(12 + 2, tokens["reasoning"], "cut; with the line break and the marker that were forced")
            self.assertGreater(tokens["generated"], 12)
            self.assertNotIn("samples", record)

    def test_behind_an_adaptation(self):
        for record in self.run_eval("qttt+thinking:steps=2,span=16,lr=1e-3,budget=8"):
            self.assertEqual(8 + 2, record["tokens"]["reasoning"])


    def test_no_answer_without_it(self):
        self.run_eval("in-context", fails="always reasons; leave it unset [NO_THINKING]")


class Methods(Evaluation):
    def test_a_model_that_need_not_think(self):
        self.assertTrue(self.client.model().thinks)
        for record in self.run_eval("thinking:budget=12"):
            self.assertLessEqual(record["tokens"]["reasoning"], 12)
        for record in self.run_eval("in-context"):
            self.assertEqual(0, record["tokens"]["reasoning"])

    def test_a_scratchpad(self):
        for record in self.run_eval("thinking:budget=12", "--chat", "off"):
            thoughts, = record["samples"]
            self.assertTrue(thoughts)
            self.assertLessEqual(record["tokens"]["reasoning"], 12)
            self.assertGreater(record["tokens"]["generated"], record["tokens"]["reasoning"])

    def test_drawn_answers(self):
        for chat in ("on", "off"):
            for method in ("self-consistency:n=4", "best-of-n:n=4"):
                with self.subTest(method=method, chat=chat):
                    for record in self.run_eval(method, "--chat", chat):
                        self.assertEqual(4, len(record["samples"]))
                        self.assertGreater(len(set(record["samples"])), 1, "drawn with one seed")
                        self.assertIn(record["answer"], record["samples"])
                        self.assertGreaterEqual(record["tokens"]["generated"], 4)


if __name__ == "__main__":
    unittest.main()
