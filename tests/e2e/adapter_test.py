"""Adapters through the command line, on the golden model: LoRA and full, exported, imported into other contexts and into
a service with another number of ranks, files that are broken, a rank that dies in between; and a LoRA in transformers
and PEFT, where those are installed.

Usage: adapter_test.py BIN_FOLDER REPOSITORY [unittest arguments].
"""
import json
import os
import pathlib
import signal
import sys
import tempfile
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
MODEL = ROOT / "tests/golden/llama"
GOLDEN = json.loads((ROOT / "tests/golden/llama.golden.json").read_text())
QUESTION = [7, 8, 9]


def ids(values):
    return " ".join(map(str, values))


def upload(service, name, values):
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(ids(values))
        file.flush()
        return service.call("context", "create", file.name, "--ids", "--id", name)


def answer(service, name, *options):
    events = service.events("ask", name, ids(QUESTION), "--ids", "--max-tokens", 8, "--ignore-eos", "--logprobs", 0,
                            *options)
    return ([int(token) for event in events for token in event["token_ids"]],
            [token["logprob"] for event in events for token in event["logprobs"]])


class Adapters(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def close(self, expected, actual, bound):
        self.assertEqual(len(expected), len(actual))
        for want, got in zip(expected, actual):
            self.assertAlmostEqual(want, got, delta=bound)

    def test_exported_and_imported_elsewhere(self):
        context = GOLDEN["context"][:300]
        with harness.Service(BIN, MODEL, ranks=1) as service:
            upload(service, "a", context)
            base = answer(service, "a", "--base")
            steps = ["--steps", 3, "--span-tokens", 30, "--learning-rate", "3e-2", "--seed", 1, "-q"]
            service.call("adapt", "a", "--adapter", "full", *steps)
            service.call("adapt", "a", "--adapter", "lora", "--lora-rank", 4, "--optimizer", "sgd", "--momentum", "0.9",
                         "--schedule", "cosine", "--warmup-steps", 1, "--clip-norm", 100, *steps)
            service.call("adapt", "a", "--adapter", "above", "--from", "lora", *steps)
            listed = {a["id"]: a for a in service.events("adapter", "list", "a")}
            self.assertEqual({"full", "lora", "above"}, set(listed))
            self.assertEqual(("LORA", "4", "6", "lora"), tuple(listed["above"][k] for k in (
                "kind", "lora_rank", "steps", "base_adapter")))
            answers = {id: answer(service, "a", "--adapter", id) for id in listed}
            self.assertNotEqual(base[1], answers["lora"][1])
            self.assertNotEqual(answers["lora"][1], answers["above"][1])
            for id in listed:
                service.call("adapter", "export", "a", id, self.folder / id)
            service.call("adapter", "export", "a", "lora", self.folder / "peft", "--peft")
            _, error = service.call("adapter", "export", "a", "full", self.folder / "no", "--peft", code=1)
            self.assertIn("[ADAPTER_KIND", error)
            upload(service, "b", context)
            service.call("adapter", "import", "b", self.folder / "lora", "--adapter", "copy")
            self.assertEqual(answers["lora"], answer(service, "b", "--adapter", "copy"))
            service.call("adapter", "delete", "a", "lora", "full")
            self.assertEqual(["above"], [a["id"] for a in service.events("adapter", "list", "a")])
            self.assertEqual(base, answer(service, "a", "--base"))
        with harness.Service(BIN, MODEL, ranks=2) as service:
            upload(service, "c", context)
            for id in listed:
                service.call("adapter", "import", "c", self.folder / id)
                tokens, logprobs = answer(service, "c", "--adapter", id)
                self.assertEqual(answers[id][0], tokens)
                self.close(answers[id][1], logprobs, 1e-4)
            service.call("adapter", "import", "c", self.folder / "peft")
            tokens, logprobs = answer(service, "c", "--adapter", "peft")
            self.assertEqual(answers["lora"][0], tokens)
            self.close(answers["lora"][1], logprobs, 1e-4)
            self.broken_files(service)
            self.killed_rank(service, answers)
        self.peft(context, base, answers["lora"])

    def broken_files(self, service):
        good = (self.folder / "lora").read_bytes()
        cases = {"damaged": good[:-50] + bytes([good[-50] ^ 1]) + good[-49:], "short": good[:-100],
                 "empty": b"", "other": b"GGUF" + good}
        before = service.events("adapter", "list", "c")
        for name, content in cases.items():
            (self.folder / name).write_bytes(content)
            _, error = service.call("adapter", "import", "c", self.folder / name, "--adapter", "bad", code=1)
            self.assertRegex(error, r"^refocus adapter import: .*\[(CHECKSUM_MISMATCH|ADAPTER_FILE_INVALID).*\]\n$")
        foreign = ROOT / "tests/golden/qwen3"  # a folder, but no adapter's
        _, error = service.call("adapter", "import", "c", foreign, code=2)
        self.assertIn("adapter_config.json", error)
        config = json.loads((self.folder / "peft/adapter_config.json").read_text())
        for key, value in (("target_modules", ["q_proj", "v_proj"]), ("use_dora", True), ("r", 0), ("bias", "all")):
            (self.folder / "peft/adapter_config.json").write_text(json.dumps({**config, key: value}))
            _, error = service.call("adapter", "import", "c", self.folder / "peft", code=2)
            self.assertIn(key + ":", error)
        (self.folder / "peft/adapter_config.json").write_text(json.dumps(config))
        self.assertEqual(before, service.events("adapter", "list", "c"))

    def killed_rank(self, service, answers):
        """The group is lost and formed anew; the file still imports."""
        os.kill(service.worker_pids()[1], signal.SIGKILL)
        process = service.start("adapter", "export", "c", "lora", self.folder / "late")
        _, error = process.communicate(timeout=60)
        if process.returncode != 0:  # else it was faster than the news
            self.assertRegex(error, r"^refocus adapter export: .*\[[A-Z_]+(, [A-Z_]+)?\]\n$")
            self.assertFalse((self.folder / "late").exists())
        self.assertFalse((self.folder / "late.part").exists())
        service.ready(2, 60)
        service.call("prefill", "c")
        service.call("adapter", "import", "c", self.folder / "lora")
        self.assertEqual(answers["lora"][0], answer(service, "c", "--adapter", "lora")[0])

    def peft(self, context, base, adapted):
        """The same log-probabilities from transformers with the PEFT folder. A context's K and V are base ones, so the
        adapter is on for the rows after it only, as in the service."""
        try:
            import peft
            import torch
            import transformers
        except ImportError as error:
            self.skipTest(f"the rest passed; no PEFT to compare with: {error}")
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        model = peft.PeftModel.from_pretrained(model, self.folder / "peft").eval()
        for adapter, want in ((False, base), (True, adapted)):
            with torch.no_grad():
                with model.disable_adapter():
                    cache = model(torch.tensor([context]), use_cache=True).past_key_values
                step, tokens, logprobs = torch.tensor([QUESTION]), [], []
                for _ in range(len(want[0])):
                    if adapter:
                        out = model(step, past_key_values=cache, use_cache=True)
                    else:
                        with model.disable_adapter():
                            out = model(step, past_key_values=cache, use_cache=True)
                    row = torch.log_softmax(out.logits[0, -1].double(), -1)
                    tokens.append(int(row.argmax()))
                    logprobs.append(row.max().item())
                    step = torch.tensor([[tokens[-1]]])
            self.assertEqual(want[0], tokens)
            self.close(want[1], logprobs, 1e-3)


if __name__ == "__main__":
    unittest.main()
