"""Many clients at once on the real engine: questions of several contexts and adapters, uploads of texts that begin
alike, adaptations, callers who leave, deletions. Every answer must be the one that was given alone, and nothing may be
left.

Usage: sharing_test.py BIN_FOLDER REPOSITORY [unittest arguments]. SEED in the environment repeats a run.
"""
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
MODEL = ROOT / "tests/golden/llama"
VOCAB = 250
TOKENS = 12  # of an answer: few enough that no tie of the two most likely tokens is decided by rounding
UNIT = 512   # tokens that two ranks share at least: a block on each


def text(seed, count):
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(count)]


COMMON = text(1, 1600)
TEXTS = {"one": COMMON + text(2, 500), "two": COMMON + text(3, 700), "other": text(4, 900)}


class Sharing(unittest.TestCase):
    def upload(self, name, values):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(" ".join(map(str, values)))
            file.flush()
            self.service.call("context", "create", file.name, "--ids", "--id", name)

    @staticmethod
    def question(draw):
        """Arguments of a question; the same ones ask the same."""
        name = draw.choice(sorted(TEXTS))
        prompt = " ".join(str(draw.randrange(3, VOCAB)) for _ in range(draw.choice([1, 4, 40])))
        adapter = ["--adapter", "kept"] if name != "other" and draw.random() < 0.5 else ["--base"]
        sampled = ["--temperature", "0.8", "--seed", str(draw.randrange(100))] if draw.random() < 0.4 else []
        return ("ask", name, prompt, "--ids", "--ignore-eos", "--max-tokens", str(TOKENS), *adapter, *sampled)

    def tokens(self, process):
        out, err = process.communicate(timeout=120)
        self.assertEqual(0, process.returncode, err)
        events = [json.loads(line) for line in out.splitlines()]
        return [int(token) for event in events for token in event["token_ids"]]

    def show(self, name):
        return self.service.events("context", "show", name)[0]

    def test_every_answer_is_the_one_given_alone(self):
        seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
        print(f"SEED={seed}", file=sys.stderr)
        draw = random.Random(seed)
        with harness.Service(BIN, MODEL, 2, "--threads-per-rank", "1") as self.service:
            for name, values in TEXTS.items():
                self.upload(name, values)
            self.assertEqual(len(COMMON) // UNIT * UNIT, int(self.show("two")["shared_tokens"]))
            self.assertEqual(0, int(self.show("other")["shared_tokens"]))
            for name in ("one", "two"):
                self.service.call("adapt", name, "--adapter", "kept", "--steps", "3", "--learning-rate", "1e-2",
                                  "--max-probe-rise", "100", "--seed", "5")
            questions = [self.question(draw) for _ in range(24)]
            alone = {q: self.tokens(self.service.start(*q, "--json")) for q in set(questions)}

            others = [self.service.start("adapt", "other", "--adapter", "busy", "--steps", "60", "--span-tokens", "16",
                                         "--learning-rate", "1e-6", "--max-probe-rise", "100")]
            leaving = [self.service.start("ask", draw.choice(sorted(TEXTS)), "7", "--ids", "--ignore-eos", "--base",
                                          "--max-tokens", "1000") for _ in range(4)]
            running = []
            for i, question in enumerate(questions):
                running.append((question, self.service.start(*question, "--json")))
                if i % 6 == 2:
                    leaving[i // 6].send_signal(signal.SIGINT)
                if i == 8:
                    self.upload("late", COMMON + text(5, 300))
                if i == 16:
                    self.service.call("context", "rm", "late", "--force")
            for question, process in running:
                self.assertEqual(alone[question], self.tokens(process), " ".join(question))
            for process in others + leaving:
                process.communicate(timeout=120)
            self.assertEqual(0, others[0].returncode)

            for name in TEXTS:  # the shared tokens go with the last of their contexts
                self.service.call("context", "rm", name)
            left = harness.wait_until("an idle service", lambda: (
                [c for c in [self.service.cluster()] if int(c["running"]) + int(c["waiting"]) == 0]), 20)[0]
            self.assertEqual((0, 0), (int(left["kv_used_bytes"]), int(left["contexts"])))
            self.assertEqual(0, self.service.stop())


if __name__ == "__main__":
    unittest.main(verbosity=2)
