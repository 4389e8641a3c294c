"""The demo on a novel runs to its end, says what it did, and leaves nothing behind.

Usage: demo_novel_test.py BIN_FOLDER REPOSITORY
"""
import os
import pathlib
import subprocess
import sys
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()


def services():
    """Living processes that run a binary of BIN."""
    found = set()
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and pathlib.Path(os.readlink(entry / "exe")).parent == BIN:
                found.add(int(entry.name))
        except OSError:
            continue
    return found


class Demo(unittest.TestCase):
    def test_demo(self):
        before = services()
        result = subprocess.run([ROOT / "deploy/demo_novel.sh", BIN], capture_output=True, text=True, timeout=800,
                                stdin=subprocess.DEVNULL)
        self.assertEqual(0, result.returncode, result.stdout + result.stderr)
        for pattern in (r"(?m)^prefill +[\d,]+ +[\d.]+ +[\d.,]+$", r"(?m)^adapt +4,096 ",
                        r"(?m)^answer, adapted +\d+ +[\d.]+ +[\d.,-]+$",
                        r"(?m)^memory per rank [\d,]+ MiB, [\d,]+ MiB$",
                        r"unseen pages: [\d.]+ nats per token before adapting, [\d.]+ after\n"
                        r"Adapting (helped|made|did not)"):
            self.assertRegex(result.stdout, pattern)
        self.assertEqual(32, sum(line.startswith("step ") for line in result.stderr.splitlines()))
        harness.wait_until("end of all that the demo started", lambda: not services() - before, 10)


if __name__ == "__main__":
    unittest.main()
