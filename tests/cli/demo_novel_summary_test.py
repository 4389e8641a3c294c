"""The closing table of the demo on a novel, also for answers without a token.

Usage: demo_novel_summary_test.py REPOSITORY [unittest arguments]
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

SCRIPT = pathlib.Path(sys.argv.pop(1)).resolve() / "deploy/demo_novel_summary.py"


def usage(tokens, seconds):
    return {"usage": {"tokens": str(tokens), "seconds": seconds, "tokens_per_second": tokens / seconds}}


def score(nats, tokens=1000):
    return {"token_count": str(tokens), "sum_logprob": -nats * tokens, "seconds": 8.0}


def answer(tokens, rate):
    return {"summary": {"generated_tokens": str(tokens), "prompt_seconds": 0.5, "decode_seconds": 1.5,
                        "tokens_per_second": rate}}


class Summary(unittest.TestCase):
    def run_on(self, **changes):
        events = {"prefill": usage(4000, 16.0), "adapt": usage(4096, 64.0), "score_base": score(3.0),
                  "score_adapted": score(2.95), "answer_base": answer(14, 14.25), "answer_adapted": answer(14, 140.4),
                  "status": {"ranks": [{"resident_bytes": str(762 << 20)}, {"resident_bytes": str(1013 << 20)}]},
                  **changes}
        with tempfile.TemporaryDirectory() as folder:
            for name, event in events.items():
                earlier = "" if name == "status" else '{"first":1}\n'
                (pathlib.Path(folder) / name).write_text(earlier + json.dumps(event) + "\n")
            result = subprocess.run([sys.executable, "-B", SCRIPT, folder], capture_output=True, text=True)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        return result.stdout

    def test_the_table(self):
        rows = [line.split() for line in self.run_on().splitlines()]
        self.assertEqual([["phase", "tokens", "seconds", "tokens/s"], ["prefill", "4,000", "16.00", "250"],
                          ["adapt", "4,096", "64.00", "64.0"], ["score,", "base", "1,000", "8.00", "125"],
                          ["score,", "adapted", "1,000", "8.00", "125"], ["answer,", "base", "14", "2.00", "14.2"],
                          ["answer,", "adapted", "14", "2.00", "140"],
                          ["memory", "per", "rank", "762", "MiB,", "1,013", "MiB"], []], rows[:9])

    def test_the_verdict_says_what_happened(self):
        self.assertIn("unseen pages: 3.0000 nats per token before adapting, 2.9500 after\n"
                      "Adapting helped this model on this text: -0.0500", self.run_on())
        self.assertIn("Adapting made little difference to this model on this text: -0.0100",
                      self.run_on(score_adapted=score(2.99)))
        self.assertIn("Adapting did not help this model on this text: +0.1000", self.run_on(score_adapted=score(3.1)))

    def test_answers_without_a_rate(self):
        text = self.run_on(answer_base=answer(0, 0), answer_adapted=answer(1, 0))
        self.assertRegex(text, r"(?m)^answer, base +0 +2\.00 +-$")
        self.assertRegex(text, r"(?m)^answer, adapted +1 +2\.00 +-$")


if __name__ == "__main__":
    unittest.main()
