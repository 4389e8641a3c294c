"""The example, as a user runs it, against a real service on the small model.

Usage: example_test.py BIN_FOLDER REPOSITORY, with the installed package on PYTHONPATH.
"""
import os
import pathlib
import re
import subprocess
import sys
import unittest

BIN, ROOT = map(pathlib.Path, sys.argv[1:3])
del sys.argv[1:3]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
import harness  # noqa: E402
import refocus  # noqa: E402

DATA = ROOT / ".deps" / "data"


class Example(unittest.TestCase):
    def test_novel(self):
        with harness.Service(BIN, DATA / "SmolLM2-135M-Instruct.Q4_1.gguf", 2, "--threads-per-rank", "1") as service:
            variables = {**os.environ, "REFOCUS_ADDRESS": service.address, "REFOCUS_BYTES": "1500",
                         "REFOCUS_STEPS": "2"}
            run = subprocess.run([sys.executable, "-B", ROOT / "python" / "examples" / "novel.py",
                                  DATA / "novels" / "persuasion.txt"], env=variables, capture_output=True, text=True,
                                 timeout=240)
            self.assertEqual(0, run.returncode, run.stdout + run.stderr)
            print(run.stdout)
            for expected in (r"2 ranks", r"prefill: (\d+) of \1\n", r"adapt: 2 of 2, loss [\d.]+ nats",
                             r"held-out spans: [\d.]+ before, [\d.]+ after"):
                self.assertRegex(run.stdout, expected)
            losses = [float(loss) for loss in re.findall(r"unseen: ([\d.]+) nats", run.stdout)]
            self.assertEqual(2, len(losses))
            self.assertNotEqual(losses[0], losses[1], "the adapter changed nothing")
            for shares in re.findall(r"(?m)^  (?:base queries|default) +(.*)$", run.stdout):
                total = sum(map(float, shares.split()))
                self.assertTrue(0.3 < total < 1.0, shares)
            self.assertEqual([], service.events("context", "list"), "the example deletes its context")
            self.check_drawing(service)
            self.assertEqual(0, service.stop())

    def check_drawing(self, service):
        """Every knob of an answer works through the client, and comes back in the summary."""
        with refocus.Client(service.address) as client, client.create("It was a dark and stormy night;") as context:
            plain = context.ask(" the rain", max_tokens=8)
            top = context.ask(" the rain", max_tokens=8, temperature=5.0, top_k=1)
            self.assertEqual(plain.token_ids, top.token_ids)
            drawn = [context.ask(" the rain", max_tokens=8, temperature=2.0, seed=seed, top_p=0.9).token_ids
                     for seed in (1, 1, 2)]
            self.assertEqual(drawn[0], drawn[1])
            self.assertNotEqual(drawn[0], drawn[2])
            knobs = {"top_k": 40, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": 0.5,
                     "frequency_penalty": 0.25, "min_tokens": 3}
            answer = context.ask(" the rain", max_tokens=8, temperature=1.0, logit_bias={plain.token_ids[0]: -1000.0},
                                 prompt_logprobs=True, **knobs)
            self.assertEqual(knobs, {name: getattr(answer.summary, name) for name in knobs})
            self.assertNotIn(plain.token_ids[0], answer.token_ids)
            score, = context.score([" the rain"], token_logprobs=True)
            self.assertEqual(len(score.token_logprobs), len(answer.prompt_logprobs))
            for ours, theirs in zip(answer.prompt_logprobs, score.token_logprobs):
                self.assertAlmostEqual(ours, theirs, delta=1e-3)
            with self.assertRaisesRegex(refocus.RefocusError, "top_p"):
                context.ask(" the rain", top_p=2.0)


if __name__ == "__main__":
    unittest.main()
