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
            self.assertEqual(0, service.stop())


if __name__ == "__main__":
    unittest.main()
