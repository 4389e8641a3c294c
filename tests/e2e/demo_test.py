"""The demo with small settings: what it prints is what its journal says, a bad setting is one line, nothing is left.

Usage: demo_test.py BIN_FOLDER REPOSITORY, with the Python package on PYTHONPATH
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
QUESTIONS = 20
METHOD = "qttt:rows=recall,lr=2e-3,steps=8"


class Demo(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.out = pathlib.Path(self.folder.name, "out")
        self.seen = set()

    def tearDown(self):
        for pid in filter(harness.alive, self.seen):
            os.kill(pid, signal.SIGKILL)
        self.folder.cleanup()

    def demo(self, timeout=120, **settings):
        """Exit code, standard output and error; notes every process that it ever had."""
        environment = {**{k: v for k, v in os.environ.items() if not k.startswith("REFOCUS_")},
                       "REFOCUS_PYTHON": sys.executable, "REFOCUS_DEMO_LENGTHS": "6144",
                       "REFOCUS_DEMO_QUESTIONS": str(QUESTIONS), "REFOCUS_DEMO_METHOD": METHOD, **settings}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen([ROOT / "deploy/demo.sh", BIN, self.out], stdout=out, stderr=err,
                                       stdin=subprocess.DEVNULL, env=environment)

            def ended():
                self.seen.update(pid for pid in harness.descendants(process.pid)
                                 if harness.command_name(pid) in harness.SERVICE_PROCESSES)
                return process.poll() is not None
            try:
                harness.wait_until("end of the demo", ended, timeout)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return process.returncode, out.read(), err.read()

    def expect_nothing_left(self):
        harness.wait_until("end of all that the demo started",
                           lambda: not [pid for pid in self.seen if harness.alive(pid)], 10)

    def test_what_it_prints_is_in_the_journal(self):
        code, output, error = self.demo()
        self.assertEqual(0, code, output + error)
        self.assertGreaterEqual(len(self.seen), 4, "serve, a coordinator, two workers")
        self.expect_nothing_left()
        records = [json.loads(line) for line in (self.out / "journal.jsonl").read_text().splitlines()]
        answers = [record for record in records if record["kind"] == "answer"]
        shares, seconds = [], []
        for method in ("in-context", METHOD):
            chosen = [record for record in answers if record["method"] == method]
            self.assertEqual(QUESTIONS, len(chosen))
            shares.append(100 * sum(record["answer"] == str(record["references"][0]) for record in chosen) / QUESTIONS)
            seconds.append(sum(record["seconds"]["wall"] for record in chosen))
        adapt, = [record for record in records if record["kind"] == "adapt"]
        self.assertLess(shares[0] + 10, shares[1], "8 steps help at this length")
        row = next(line for line in output.splitlines() if line.startswith(" 6,144 "))
        self.assertEqual([
            "6,144", f"{shares[0]:.1f}", f"{shares[1]:.1f}", f"{shares[1] - shares[0]:+.1f}",
            f"{answers[0]['seconds']['prefill']:.2f}", f"{adapt['seconds']:.2f}", f"{seconds[0]:.2f}", "+",
            f"{seconds[1]:.2f}"], re.sub(r"\([^)]*\)", "", row).split(), "without intervals")
        self.assertEqual(8, adapt["steps"])
        page = (self.out / "report.html").read_text()
        self.assertIn("loss of each step", page)
        self.assertIn("share of right answers by length", page)

        before = (self.out / "journal.jsonl").read_text()
        (self.out / "journal.jsonl").write_text("".join(
            line + "\n" for line in before.splitlines() if METHOD not in line))
        cut = subprocess.run([sys.executable, "-B", ROOT / "deploy/demo_summary.py", self.out], capture_output=True,
                             text=True)
        self.assertEqual((1, 1), (cut.returncode, len(cut.stderr.splitlines())), cut.stderr)
        self.assertIn("got a run that did not end", cut.stderr)

    def test_bad_settings(self):
        for settings, message in (
                ({"REFOCUS_DEMO_METHOD": "qttt:rows=all"}, r"rows='all', allowed uniform or recall"),
                ({"REFOCUS_DEMO_LENGTHS": "100000"}, r"got a length of 100000 tokens, allowed 2 to 32775"),
                ({"REFOCUS_PYTHON": "/nowhere/python3"}, r"cannot start /nowhere/python3")):
            code, _, error = self.demo(**settings)
            self.assertEqual((2, 1), (code, len(error.splitlines())), error)
            self.assertRegex(error, f"^refocus eval: .*{message}")
            self.expect_nothing_left()


if __name__ == "__main__":
    unittest.main()
