"""The whole service through the command line, on the golden model: upload, prefill, adapt, ask, score; errors;
start-up failures.

Usage: service_test.py BIN_FOLDER REPOSITORY [unittest arguments]. The golden files were computed by an unsharded
fp64 model that shares no code with the service (tests/golden/README.md).
"""
import json
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
MODEL = ROOT / "tests/golden/llama"
GOLDEN = json.loads((ROOT / "tests/golden/llama.golden.json").read_text())


def ids(values):
    return " ".join(map(str, values))


def upload(service, name, values, *options):
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(ids(values))
        file.flush()
        return service.call("context", "create", file.name, "--ids", "--id", name, *options)


def answer(service, name, prompt, count, *options):
    """Greedy tokens and their log-probabilities, and the closing summary."""
    events = service.events("ask", name, ids(prompt), "--ids", "--max-tokens", count, "--ignore-eos", "--logprobs", 0,
                            *options)
    tokens = [int(token) for event in events for token in event["token_ids"]]
    logprobs = [token["logprob"] for event in events for token in event["logprobs"]]
    return tokens, logprobs, events[-1]["summary"]


class Golden(unittest.TestCase):
    """One context's whole life on 1 to 4 ranks against the golden run, and against each other."""

    adapted = {}  # ranks -> losses and answer after the same adaptation

    def check_answers(self, service):
        for which in ("plain", "question"):
            want = GOLDEN["answers"][f"base.{which}"]
            tokens, logprobs, summary = answer(service, "golden", want["question"], len(want["tokens"]), "--base")
            self.assertEqual(want["tokens"], tokens)
            self.close(want["logprobs"], logprobs, 1e-4)
            self.assertEqual(("0", str(len(GOLDEN["context"])), str(len(want["question"])), "FINISH_LENGTH"),
                             tuple(summary[k] for k in ("adapter_revision", "context_tokens", "prompt_tokens",
                                                        "finish_reason")))

    def check_scores(self, service):
        want = GOLDEN["scores"]["base"]
        event, = service.events("score", "golden", "--ids", "--prompt", ids(want["question"]),
                                "--target", ids(want["targets"]), "--token-logprobs", "--base")
        self.assertEqual(str(len(want["targets"])), event["token_count"])
        self.close(want["logprobs"], event["token_logprobs"], 1e-4)
        self.assertAlmostEqual(sum(want["logprobs"]), event["sum_logprob"], delta=1e-3)
        self.assertEqual(all(want["greedy"]), event["is_greedy"])

    def check_probe(self, service):
        """Every row that sees the context alone gives all its attention to it; one behind it keeps a share for itself."""
        tokens = len(GOLDEN["context"])
        *pieces, summary = service.events("probe", "golden", "--base", "--positions", f"5,{tokens - 1}", "--per-row",
                                          "--per-head", "--range", f"0:{tokens}", "--range", "6:6", "--range", ":6")
        layers = {}  # a layer's rows may come in several pieces
        for piece in pieces:
            whole = layers.setdefault(piece["layer"], {"positions": [], "mass": []})
            for field, values in whole.items():
                values += piece[field]
        inside = list(layers.values())
        for event in inside:
            self.assertEqual([5, tokens - 1], [int(p) for p in event["positions"]])
        self.assertEqual(summary["summary"]["rows"], "2")
        heads = len(summary["summary"]["heads"])
        for event in inside:
            self.close([1.0] * heads + [0.0] * heads + [1.0] * heads, event["mass"][:3 * heads], 1e-5)
            self.close([1.0] * heads + [0.0] * heads, event["mass"][3 * heads:5 * heads], 1e-5)
        self.assertTrue(any(0.001 < mass < 0.999 for event in inside for mass in event["mass"][5 * heads:]))
        *behind, _ = service.events("probe", "golden", ids([1, 2, 3]), "--ids", "--base", "--parts", 3, "--layers", 1)
        self.assertEqual([1], [event["layer"] for event in behind])
        self.assertTrue(0.001 < sum(behind[0]["mass"]) < 0.999, behind)
        table = service.call("probe", "golden", ids([1, 2, 3]), "--ids", "--parts", 2)
        self.assertRegex(table, rf"layer +0 to \d+ +\d+ to {tokens}")
        self.assertIn("even spread", table)
        self.assertIn("BEGIN:END", service.call("probe", "golden", "--range", "9:3", code=2)[1])
        self.assertIn("FIELD_OUT_OF_RANGE", service.call("probe", "golden", "--layers", 99, code=1)[1])
    def check_sampling(self, service):
        want = GOLDEN["answers"]["base.question"]
        count = len(want["tokens"])
        greedy = ("--base", "--temperature", 5, "--top-k", 1, "--top-p", 0.5, "--min-p", 0.25, "--min-tokens", 2)
        tokens, logprobs, summary = answer(service, "golden", want["question"], count, *greedy, "--prompt-logprobs")
        self.assertEqual(want["tokens"], tokens)
        self.close(want["logprobs"], logprobs, 1e-4)  # at temperature 1, before any filter
        self.assertEqual((5, 1, 0.5, 0.25, "2", 1),
                         tuple(summary[k] for k in ("temperature", "top_k", "top_p", "min_p", "min_tokens",
                                                    "repetition_penalty")))
        events = service.events("ask", "golden", ids(want["question"]), "--ids", "--max-tokens", 1, "--base",
                                "--prompt-logprobs")
        event, = service.events("score", "golden", "--ids", "--target", ids(want["question"]), "--token-logprobs",
                                "--base")
        self.close(event["token_logprobs"], events[0]["prompt_logprobs"], 1e-4)
        scored = GOLDEN["scores"]["base"]
        events = service.events("ask", "golden", ids(scored["question"] + scored["targets"]), "--ids", "--max-tokens",
                                1, "--base", "--prompt-logprobs")
        self.close(scored["logprobs"], events[0]["prompt_logprobs"][len(scored["question"]):], 1e-4)
        bias = [part for token in set(want["tokens"]) for part in ("--logit-bias", f"{token}=-1000")]
        tokens, _, summary = answer(service, "golden", want["question"], count, "--base", *bias)
        self.assertFalse(set(tokens) & set(want["tokens"]))
        self.assertEqual(len(set(want["tokens"])), len(summary["logit_bias"]))
        tokens, _, _ = answer(service, "golden", want["question"], count, "--base", "--repetition-penalty", 100)
        self.assertEqual(count, len(set(tokens)))
        drawn = [answer(service, "golden", want["question"], count, "--base", "--temperature", 5, "--top-k", 50,
                        "--seed", seed)[0] for seed in (3, 3, 4)]
        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])

    def check_gradient(self, service, which):
        """A step with rate zero measures loss and gradient norm, and must change no bit of any answer."""
        want = GOLDEN["gradients"][which]
        events = self.adapt(service, "zero", want["spans"], 1, 0)
        step, = [event["step"] for event in events if "step" in event]
        self.assertAlmostEqual(want["loss"], step["loss"], delta=1e-5)
        self.assertAlmostEqual(want["norm"], step["grad_norm"], delta=1e-4 * want["norm"])
        self.assertEqual(answer(service, "golden", [1, 2, 3], 8, "--base")[:2],
                         answer(service, "golden", [1, 2, 3], 8, "--adapter", "zero")[:2])

    def adapt(self, service, adapter, spans, steps, rate):
        words = [word for start, rows in spans for word in ("--span", f"{start}:{rows}")]
        return service.events("adapt", "golden", "--adapter", adapter, "--steps", steps, "--spans-per-step", len(spans),
                              "--learning-rate", rate, "--clip-norm", 3, "--max-probe-rise", 100, *words)

    def close(self, want, got, delta):
        self.assertEqual(len(want), len(got))
        for a, b in zip(want, got):
            self.assertAlmostEqual(a, b, delta=delta)

    def run_on(self, ranks):
        with harness.Service(BIN, MODEL, ranks, "--threads-per-rank", "1") as service:
            self.assertIn("1 rank," if ranks == 1 else f"{ranks} ranks,", service.ready(1))
            upload(service, "golden", GOLDEN["context"])
            self.check_answers(service)
            self.check_scores(service)
            self.check_probe(service)
            self.check_sampling(service)
            self.check_gradient(service, "one_span")
            self.check_gradient(service, "two_spans")
            before = answer(service, "golden", [1, 2, 3], 8, "--base")[:2]

            events = self.adapt(service, "default", [[300, 37]], 6, 0.01)
            losses = [event["step"]["loss"] for event in events if "step" in event]
            self.assertLess(losses[-1], losses[0] - 0.5)
            after = answer(service, "golden", [1, 2, 3], 8)  # the adapter "default" answers by default
            self.assertEqual("1", after[2]["adapter_revision"])
            self.assertNotEqual(before[1], after[1])
            self.adapted[ranks] = (losses, after[0], after[1])
            for others in self.adapted.values():
                self.close(others[0], losses, 1e-5)
                self.assertEqual(others[1], after[0])
                self.close(others[2], after[1], 1e-4)

            # The base is untouched, to the bit, beside the adapter and after it is gone.
            self.assertEqual(before, answer(service, "golden", [1, 2, 3], 8, "--base")[:2])
            service.call("context", "rm", "golden", "--adapter", "default")
            self.assertEqual(before, answer(service, "golden", [1, 2, 3], 8)[:2])
            self.assertGreater(int(service.cluster()["kv_used_bytes"]), 0)
            service.call("context", "rm", "golden")
            self.assertEqual("0", service.cluster()["kv_used_bytes"])
            self.assertEqual(0, service.stop())

    def test_1_rank(self):
        self.run_on(1)

    def test_2_ranks(self):
        self.run_on(2)

    def test_3_ranks(self):
        self.run_on(3)

    def test_4_ranks(self):
        self.run_on(4)


class Requests(unittest.TestCase):
    """What people do wrong, on one running service; it must go on working."""

    @classmethod
    def setUpClass(cls):
        cls.service = harness.Service(BIN, MODEL, 2, "--threads-per-rank", "1").__enter__()
        upload(cls.service, "doc", GOLDEN["context"][:40])

    @classmethod
    def tearDownClass(cls):
        cls.service.__exit__(None, None, None)

    def refused(self, reason, *arguments):
        out, err = self.service.call(*arguments, code=1)
        with self.subTest(arguments=arguments):
            self.assertIn(f"[{reason}, ", [line for line in err.splitlines() if line.startswith("refocus ")][0])
            self.assertNotIn("Traceback", err + out)

    def test_errors_name_their_reason(self):
        self.refused("CONTEXT_NOT_FOUND", "ask", "gone", "1", "--ids")
        self.refused("CONTEXT_NOT_FOUND", "context", "show", "gone")
        self.refused("CONTEXT_NOT_FOUND", "context", "rm", "gone")
        self.service.call("context", "rm", "gone", "--missing-ok")
        self.refused("ADAPTER_NOT_FOUND", "ask", "doc", "1", "--ids", "--adapter", "gone")
        self.refused("TOKEN_ID_OUT_OF_RANGE", "ask", "doc", "251", "--ids")
        self.refused("FIELD_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--max-tokens", "0")
        self.refused("FIELD_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--temperature", "nan")
        for bias in ("7", "x=1", "7=", "=1", "7=one", "7=1e9"):
            self.refused("FIELD_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--logit-bias", bias)
        self.refused("TOKEN_ID_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--logit-bias", "9999999=1")
        self.refused("FIELD_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--top-p", "0")
        self.refused("FIELD_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--samples", "2")  # all would be the same
        self.refused("FIELD_OUT_OF_RANGE", "ask", "doc", "1", "--ids", "--samples", "65", "--temperature", "1")
        self.refused("FIELD_OUT_OF_RANGE", "adapt", "doc", "--learning-rate", "-1")
        self.refused("FIELD_OUT_OF_RANGE", "adapt", "doc", "--steps", "0")
        self.refused("FIELD_OUT_OF_RANGE", "adapt", "doc", "--span", "39:5")
        self.refused("NO_TOKENIZER", "ask", "doc", "a question in words", "--raw")
        self.refused("NO_TOKENIZER", "tokenize", "words")
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("1 2 3")
            file.flush()
            self.refused("CONTEXT_EXISTS", "context", "create", file.name, "--ids", "--id", "doc")
            self.refused("FIELD_OUT_OF_RANGE", "context", "create", file.name, "--ids", "--id", "Not-Allowed")
            self.refused("NO_TOKENIZER", "context", "create", file.name)

    def test_samples_are_what_each_is_alone(self):
        ask = ("ask", "doc", "1 2", "--ids", "--max-tokens", "6", "--ignore-eos", "--temperature", "1")
        events = self.service.events(*ask, "--samples", "3", "--seed", "7")
        tokens, seeds = {}, {}
        for event in events:
            sample = event.get("sample", 0)
            tokens.setdefault(sample, []).extend(event["token_ids"])
            if "summary" in event:
                seeds[sample] = event["summary"]["seed"]
        self.assertEqual({0, 1, 2}, set(seeds))
        self.assertEqual("7", seeds[0])
        self.assertEqual(3, len(set(map(tuple, tokens.values()))))
        for sample, seed in seeds.items():
            alone = self.service.events(*ask, "--seed", seed)
            self.assertEqual(tokens[sample], [i for event in alone for i in event["token_ids"]])

    def test_validate_only_changes_nothing(self):
        event, = self.service.events("adapt", "doc", "--validate-only", "--steps", "5", "--seed", "9")
        self.assertEqual(("5", "9"), (event["effective"]["steps"], event["effective"]["seed"]))
        shown, = self.service.events("context", "show", "doc")
        self.assertEqual(("READY", []), (shown["state"], shown["adapters"]))

    def test_ctrl_c_cancels_an_adaptation_and_leaves_no_trace(self):
        process = self.service.start("adapt", "doc", "--steps", "10000", "--learning-rate", "1e-6",
                                     "--span-tokens", "8", "--max-probe-rise", "100")
        harness.first_line(process.stderr, lambda line: line.startswith("step "))
        process.send_signal(signal.SIGINT)
        self.assertEqual(130, process.wait(timeout=20))
        process.communicate()
        shown = harness.wait_until("the context is READY again", lambda: (
            [c for c in self.service.events("context", "show", "doc") if c["state"] == "READY"]), 10)[0]
        self.assertEqual([], [a for a in shown["adapters"] if int(a["revision"]) > 0])
        answer(self.service, "doc", [1], 2)

    def test_an_adaptation_that_goes_on_can_be_attached_to(self):
        work = ["adapt", "doc", "--adapter", "later", "--steps", "600", "--learning-rate", "1e-6", "--span-tokens", "8",
                "--max-probe-rise", "100", "--keep-going"]
        process = self.service.start(*work)
        harness.first_line(process.stderr, lambda line: line.startswith("step "))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        self.assertEqual(130, process.returncode, err)
        self.assertIn("the work goes on", err)
        request_id = err.split("--request-id ")[1].split()[0]
        events = self.service.events(*work, "--request-id", request_id)
        adapter = events[-1]["adapter"]
        self.assertEqual(("later", "1", "600"), tuple(adapter[key] for key in ("id", "revision", "steps")))
        again = self.service.events(*work, "--request-id", request_id)  # its result, not a second adaptation
        self.assertEqual(adapter, again[-1]["adapter"])
        self.service.call("context", "rm", "doc", "--adapter", "later")

    def test_status_screen(self):
        text = self.service.call("status")
        for word in ("SERVING", "2 of 2 ranks", "1 context,", "llama", "token ids only", "heartbeat"):
            self.assertIn(word, text)
        self.assertEqual("SERVING\n", self.service.call("status", "--health"))


class Families(unittest.TestCase):
    """Models of other families, their window stretched on request, against tests/golden/make_families.py."""

    CASES = {case["name"]: case for case in
             json.loads((ROOT / "tests/golden/families/families.golden.json").read_text())["cases"]}

    def check(self, name, model, *options):
        case = self.CASES[name]
        with harness.Service(BIN, model, 2, *options) as service:
            upload(service, "doc", case["context"])
            service.call("prefill", "doc")
            tokens, _, _ = answer(service, "doc", case["question"], len(case["tokens"]), "--base")
            self.assertEqual(case["tokens"], tokens)
            lines = [json.loads(line) for line in service.call("status", "--json").splitlines()]
            return next(line for line in lines if "rope_scaling" in line)

    def test_yarn_on_request(self):
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / "model"
            shutil.copytree(ROOT / "tests/golden/families/qwen2", model)
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
            status = self.check("qwen2_yarn", model, "--rope-scaling", "yarn:4")
            self.assertEqual(("qwen2", "512", "yarn:4:128"),
                             tuple(status[key] for key in ("family", "max_positions", "rope_scaling")))

    def test_gguf_with_rope_factors(self):
        status = self.check("llama_gguf", ROOT / "tests/golden/families/llama.gguf")
        self.assertEqual(("llama", "512", "factors"),
                         tuple(status[key] for key in ("family", "max_positions", "rope_scaling")))


class Connections(unittest.TestCase):
    """More idle connections than descriptors that the coordinator was started with."""

    def test_idle_connections_do_not_stop_the_listener(self):
        few = 100
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        command = [BIN / "refocus-coordinator", "--model", MODEL, "--listen", "127.0.0.1:0", "--worker-listen",
                   "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))) as process:
            try:
                address = process.stdout.readline().split("public=")[1].split()[0]
                host, port = address.split(":")
                idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(2 * few)]
                status = subprocess.run([BIN / "refocus", "status", "--health", "--address", address],
                                        capture_output=True, text=True, timeout=30)
                self.assertEqual("NOT_SERVING\n", status.stdout, status.stderr)
                for connection in idle:
                    connection.close()
            finally:
                process.kill()


class StartUp(unittest.TestCase):
    """Broken models end `refocus serve` with the documented exit code and one clear line."""

    def serve(self, model):
        command = [BIN / "refocus", "serve", "--model", model, "--ranks", "2", "--listen", "127.0.0.1:0"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        return process.returncode, process.stdout + process.stderr

    def broken(self, code, word, damage):
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / "model"
            shutil.copytree(MODEL, model)
            damage(model)
            got, text = self.serve(model)
            with self.subTest(word=word):
                self.assertEqual(code, got, text)
                self.assertIn(word, text)
                self.assertNotIn("Ready", text)

    def test_configuration(self):
        self.broken(2, "config.json", lambda model: (model / "config.json").write_text("{"))
        self.broken(2, "config.json", lambda model: (model / "config.json").unlink())

    def test_weights(self):
        shard = "model-00002-of-00003.safetensors"
        self.broken(3, shard, lambda model: (model / shard).write_bytes((MODEL / shard).read_bytes()[:-100]))
        self.broken(3, shard, lambda model: (model / shard).unlink())

    def test_gguf(self):
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(b"GGUF\x03\0\0\0")
            file.flush()
            code, text = self.serve(file.name)
            self.assertEqual(3, code, text)


if __name__ == "__main__":
    unittest.main()
