"""A real model on real text, through the command line.

Usage: real_model_test.py BIN_FOLDER REPOSITORY [unittest arguments]
"""
import pathlib
import re
import signal
import sys
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
MODEL = ROOT / ".deps/data/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / ".deps/data/novels/persuasion.txt"
QUESTION = "Who is Sir Walter Elliot?"


class RealModel(unittest.TestCase):
    results = {}  # ranks -> what must not depend on them

    def run_on(self, ranks):
        # Plain ChatML, without the template's own system prompt, which the reference figures do not have.
        with harness.Service(BIN, MODEL, ranks, "--chat-template", "chatml") as service:
            created = service.call("context", "create", TEXT, "--id", "novel", "--max-bytes", "2600", "--chat")
            self.assertIn("contexts/novel: ", created)
            self.assertRegex(created, r"(?m)^prefill +\d+ +[\d.]+ +[\d.,]+")
            score = ["score", "novel", "--target-file", TEXT, "--skip-bytes", "2600", "--max-bytes", "600"]
            base, = service.events(*score, "--base")
            # What transformers 5.23 gives in fp32 for the same file, opening and lines.
            self.assertIn("706 tokens", created)
            self.assertEqual("147", base["token_count"])
            self.assertAlmostEqual(-541.228, base["sum_logprob"], delta=0.02)

            events = service.events("adapt", "novel", "--steps", 4, "--span-tokens", 64, "--learning-rate", 3e-4,
                                    "--seed", 3)
            steps = [event["step"] for event in events if "step" in event]
            self.assertEqual(4, len(steps))
            adapted, = service.events(*score)
            self.assertNotEqual(base["sum_logprob"], adapted["sum_logprob"])
            again, = service.events(*score, "--base")
            self.assertEqual(base["sum_logprob"], again["sum_logprob"])

            ask = ["ask", "novel", QUESTION, "--max-tokens", 16]
            answers = [service.call(*ask, "--base"), service.call(*ask)]
            for answer in answers:
                self.assertGreater(len(answer.strip()), 10)
            self.assertEqual(answers[0], service.call(*ask, "--base"))
            losses = [step["loss"] for step in steps]
            self.results[ranks] = (answers, losses, base["sum_logprob"], adapted["sum_logprob"])
            for other in self.results.values():
                self.assertEqual(other[0], answers)
                for a, b in zip(other[1], losses):
                    self.assertAlmostEqual(a, b, delta=1e-4)
                self.assertAlmostEqual(other[2], base["sum_logprob"], delta=0.02)
                self.assertAlmostEqual(other[3], adapted["sum_logprob"], delta=0.05)
            self.assertEqual(0, service.stop())

    def test_1_rank(self):
        self.run_on(1)

    def test_2_ranks(self):
        self.run_on(2)

    def test_eight_bit_keys_and_values(self):
        """Perplexity within 1% of transformers in fp32, and a first step like that of fp32 on one rank."""
        with harness.Service(BIN, MODEL, 2, "--chat-template", "chatml", "--kv-dtype", "int8") as service:
            self.assertRegex(service.call("status"), r"K/V [\d.]+ KiB a token \(int8\)")
            service.call("context", "create", TEXT, "--id", "novel", "--max-bytes", "2600", "--chat")
            shown, = service.events("context", "show", "novel")
            self.assertEqual(706 * 30 * 2 * 3 * (64 + 2), int(shown["kv_bytes"]))
            score, = service.events("score", "novel", "--target-file", TEXT, "--skip-bytes", "2600", "--max-bytes",
                                    "600", "--base")
            self.assertNotAlmostEqual(-541.228 / 147, score["sum_logprob"] / 147, delta=2e-4)
            self.assertAlmostEqual(-541.228 / 147, score["sum_logprob"] / 147, delta=0.01)
            events = service.events("adapt", "novel", "--steps", 1, "--span-tokens", 64, "--seed", 3)
            step, = [event["step"] for event in events if "step" in event]
            self.assertAlmostEqual(2.6240, step["loss"], delta=0.01)
            self.assertAlmostEqual(0.9858, step["grad_norm"], delta=0.01)
            self.assertEqual(0, service.stop())

    def wait_for(self, service, state, seconds):
        harness.wait_until(state, lambda: service.events("context", "show", "novel")[0]["state"] == state, seconds)

    def test_watching_a_prefill_does_not_end_it(self):
        with harness.Service(BIN, MODEL, 1) as service:
            work = [["context", "create", TEXT, "--id", "novel", "--max-tokens", "1200", "--keep-going"],
                    ["prefill", "novel"]]
            for words in work:
                process = service.start(*words)
                harness.first_line(process.stderr, lambda line: line.startswith("prefill: "))
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=20)
                self.assertEqual(130, process.returncode, err)
                self.assertIn("the work goes on", err)
                shown, = service.events("context", "show", "novel")
                self.assertEqual("PREFILLING", shown["state"])
            self.wait_for(service, "READY", 100)
            # Begun by this call, it ends with it.
            service.call("context", "rm", "novel")
            service.call("context", "create", TEXT, "--id", "novel", "--max-tokens", "1200", "--no-prefill")
            process = service.start("prefill", "novel")
            harness.first_line(process.stderr, lambda line: line.startswith("prefill: "))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
            self.assertIn("the request was cancelled", err)
            self.wait_for(service, "CREATED", 10)

    def test_sampling_and_stops(self):
        with harness.Service(BIN, MODEL, 1) as service:
            service.call("context", "create", TEXT, "--id", "novel", "--max-tokens", "40")
            ask = ["ask", "novel", " He", "--max-tokens", "20", "--temperature", "1", "--quiet"]
            first = service.call(*ask, "--seed", "5")
            self.assertEqual(first, service.call(*ask, "--seed", "5"))
            self.assertNotEqual(first, service.call(*ask, "--seed", "6"))
            # Not from the tail: rows of a batch are rounded differently, and its tokens are thinner than that.
            likely = [*ask[:-1], "--top-k", "20"]
            process = service.start(*likely, "--seed", "5", "--samples", "3", "--logprobs", "0")
            out, err = process.communicate(timeout=120)
            self.assertEqual(0, process.returncode, err)
            parts = re.split(r"^Sample (\d):\n", out, flags=re.M)
            self.assertEqual(("", "0", "1", "2"), (parts[0], *parts[1::2]))
            seeds = re.findall(r"temperature 1, seed (\d+)", err)
            self.assertEqual((3, 3, "5"), (len(seeds), out.count("log-probability"), seeds[0]))
            for seed, part in zip(seeds, parts[2::2]):
                self.assertTrue(part.startswith(service.call(*likely, "--quiet", "--seed", seed)), part)
            stop = first.strip()[4:8]
            self.assertEqual(first[:first.index(stop)], service.call(*ask, "--seed", "5", "--stop", stop).rstrip("\n"))
            text = "caf\u00e9 \u2014 \U0001f600 \u4e2d\u6587"
            ids = service.call("tokenize", text).strip()
            self.assertEqual(text + "\n", service.call("tokenize", "--decode", ids))
            self.assertEqual(f"{len(ids.split())}\n", service.call("tokenize", "--count", text))


if __name__ == "__main__":
    unittest.main()
