"""The refocus binary without a server: help, usage errors, exit codes.

Usage: cli_test.py BIN_FOLDER [unittest arguments]
"""
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import unittest

BIN = pathlib.Path(sys.argv.pop(1))
VERBS = [["serve"], ["context", "create"], ["context", "list"], ["context", "show"], ["context", "rm"], ["prefill"],
         ["adapt"], ["ask"], ["score"], ["probe"], ["tokenize"], ["plan"], ["eval"], ["status"],
         ["version"]]


def refocus(*arguments, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("REFOCUS_")}
    return subprocess.run([BIN / "refocus", *arguments], capture_output=True, text=True, timeout=60,
                          stdin=subprocess.DEVNULL, env={**variables, **environment})


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Help(unittest.TestCase):
    def test_top(self):
        result = refocus("--help")
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        for verb in VERBS:
            self.assertRegex(result.stdout, rf"(?m)^  {verb[0]} ")
        for word in ("REFOCUS_ADDRESS", "NO_COLOR", "Exit codes:", "130"):
            self.assertIn(word, result.stdout)

    def test_every_verb(self):
        for verb in VERBS:
            with self.subTest(verb=verb):
                result = refocus(*verb, "--help")
                self.assertEqual((0, ""), (result.returncode, result.stderr))
                self.assertIn("Usage: refocus " + " ".join(verb), result.stdout)
                if verb[0] not in ("serve", "plan", "eval", "version"):
                    self.assertIn("(Env:REFOCUS_ADDRESS)", result.stdout)
                self.assertNotIn("Exit codes:", result.stdout)

    def test_defaults_and_units(self):
        text = refocus("adapt", "--help").stdout
        for word in ("Optimizer", "Spans", "Held-out spans", "Connection and output", "(32)", "(1e-5", "(128)",
                     "seconds", "nats"):
            self.assertIn(word, text)
        self.assertIn("127.0.0.1:7070", refocus("serve", "--help").stdout)

    def test_sampling(self):
        text = refocus("ask", "--help").stdout
        for option in ("--temperature", "--seed", "--top-k K", "--top-p", "--min-p", "--repetition-penalty",
                       "--presence-penalty", "--frequency-penalty", "--logit-bias ID=VALUE", "--min-tokens",
                       "--stop-token-id ID", "--prompt-logprobs", "--samples N"):
            self.assertRegex(text, rf"(?m)^ +{option}\b")

    def test_version(self):
        plain, as_json = refocus("version"), refocus("version", "--json")
        self.assertEqual(0, plain.returncode)
        fields = json.loads(as_json.stdout)
        self.assertEqual({"version", "protocol", "build", "compiler", "grpc", "protobuf"}, set(fields))
        self.assertTrue(plain.stdout.startswith(f"refocus {fields['version']} "))


class UsageErrors(unittest.TestCase):
    def check(self, arguments, *words, code=2, **environment):
        result = refocus(*arguments, **environment)
        with self.subTest(arguments=arguments):
            self.assertEqual((code, ""), (result.returncode, result.stdout), result.stderr)
            self.assertEqual(1, result.stderr.count("\n"), result.stderr)
            for word in words:
                self.assertIn(word, result.stderr)

    def test_wrong_words(self):
        self.check([], "subcommand", "refocus --help")
        self.check(["contxt"], "'contxt'", "did you mean 'context'?")
        self.check(["context", "shw", "x"], "'shw'", "did you mean 'show'?", "refocus context --help")
        self.check(["adapt", "x", "--step", "3"], "'--step'", "did you mean '--steps'?", "refocus adapt --help")
        self.check(["adapt", "x", "--steps", "three"], "three", "--steps")
        self.check(["ask", "x"], "QUESTION")
        self.check(["ask", "x", "q", "--base", "--adapter", "a"], "--base", "--adapter")
        self.check(["ask", "x", "q", "--samples", "2", "--conversation", "f"], "--samples", "--conversation")
        self.check(["ask", "x", "q", "--samples", "two"], "two", "--samples")
        self.check(["score", "x", "--target", "t", "--parts", "0"], "--parts")
        self.check(["serve"], "--model")
        self.check(["serve", "--model", "m", "--ranks", "0"], "--ranks")

    def test_files(self):
        self.check(["serve", "--model", "/no/such"], "/no/such", "allowed", "[CONFIG_INVALID]")
        self.check(["serve"], "/no/such", REFOCUS_MODEL="/no/such")
        self.check(["context", "create", "/no/such"], "/no/such", "No such file", "CONFIG_INVALID")
        self.check(["context", "create", "/"], "cannot read", "CONFIG_INVALID")
        self.check(["adapt", "x", "--json-file", "/no/such/file"], "--json-file", "/no/such/file", "No such file")
        self.check(["adapt", "x", "--span", "1-2"], "--span", "1-2", "START:LENGTH", "FIELD_OUT_OF_RANGE")

    def test_ids(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("1, 2\n3 x4")
            file.flush()
            self.check(["context", "create", "--ids", file.name], "x4 as id number 4", "FIELD_OUT_OF_RANGE", code=1)

    def test_no_server(self):
        port = closed_port()
        begin = time.monotonic()
        for verb in (["status"], ["context", "list"], ["adapt", "x"], ["ask", "x", "q"], ["prefill", "x"]):
            result = refocus(*verb, REFOCUS_ADDRESS=f"127.0.0.1:{port}")
            with self.subTest(verb=verb):
                self.assertEqual((1, ""), (result.returncode, result.stdout.strip()))
                first = result.stderr.splitlines()[0]
                for word in (f"127.0.0.1:{port}", "refocus serve", "[NOT_REACHABLE, UNAVAILABLE]"):
                    self.assertIn(word, first)
        # An option beats the environment.
        result = refocus("status", "--address", "127.0.0.1:1", REFOCUS_ADDRESS="127.0.0.1:2")
        self.assertIn("127.0.0.1:1:", result.stderr)
        self.assertLess(time.monotonic() - begin, 40)


class Plan(unittest.TestCase):
    CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
              "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "intermediate_size": 9728, "vocab_size": 151936, "max_position_embeddings": 40960,
              "tie_word_embeddings": True}

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.model = folder.name
        (pathlib.Path(self.model) / "config.json").write_text(json.dumps(self.CONFIG))

    def plan(self, *arguments, code=0, **environment):
        result = refocus("plan", *arguments, **environment)
        self.assertEqual(code, result.returncode, result.stdout + result.stderr)
        return result

    def test_table(self):
        result = self.plan("--model", self.model, "--gpus", "2", "--gpu-memory", "141GB", "--tokens", "1048576",
                           "--adapt")
        self.assertEqual("", result.stderr)
        rows = {line[:36].strip(): line[36:].split() for line in result.stdout.splitlines()}
        self.assertEqual(["7.49", "GiB", "15.0", "GiB"], rows["weights"])
        self.assertEqual(["72.0", "GiB", "144", "GiB"], rows["K/V of 1,048,576 tokens"])
        self.assertEqual(["6.33", "GiB", "12.7", "GiB"], rows["adaptation: delta, gradient, moments"])
        self.assertIn("free", rows)
        self.assertRegex(result.stdout,
                         r"largest context: [\d,]+ tokens, without adaptation [\d,]+; .* 40,960 positions")

    def test_json_adds_up(self):
        fields = json.loads(self.plan("--model", self.model, "--tokens", "131072", "--adapt", "--json").stdout)
        self.assertTrue(fields["fits"])
        self.assertEqual("", fields["advice"])
        self.assertEqual(8_044_936_192, fields["weight_bytes"])
        self.assertEqual(131072 * 147456, fields["kv_bytes"])
        self.assertEqual(18 * 377_487_360, fields["adaptation_bytes"])
        parts = ("weight", "kv", "adaptation", "adapter", "workspace", "runtime")
        self.assertEqual(fields["total_bytes"], sum(fields[part + "_bytes"] for part in parts))
        self.assertEqual(80 * 10 ** 9, fields["total_bytes"] + fields["free_bytes"])

    def test_eight_bit_keys_and_values(self):
        arguments = ("--model", self.model, "--gpu-memory", "141GB", "--tokens", "1048576")
        self.assertIn("or --kv-dtype int8", self.plan(*arguments, code=4).stderr)
        result = self.plan(*arguments, "--kv-dtype", "int8")
        self.assertIn("73.1 KiB a token (int8)", result.stdout)
        fields = json.loads(self.plan(*arguments, "--json", REFOCUS_KV_DTYPE="int8").stdout)
        self.assertEqual(1048576 * 36 * 2 * 8 * 130, fields["kv_bytes"])
        for device, dtype, word in (("cuda", "fp32", "allowed bf16, int8"), ("cpu", "bf16", "allowed fp32, int8"),
                                    ("cpu", "fp8", "not in {fp32,bf16,int8}")):
            result = self.plan("--model", self.model, "--device", device, "--memory", "40GiB", "--kv-dtype", dtype,
                               code=2)
            self.assertIn(word, result.stdout + result.stderr)

    def test_what_does_not_fit(self):
        result = self.plan("--tokens", "1048576", "--json", code=4, REFOCUS_MODEL=self.model)
        fields = json.loads(result.stdout)
        self.assertFalse(fields["fits"])
        self.assertEqual(1, result.stderr.count("\n"))
        for word in ("does not fit: short by", "at least 3 ranks", f"at most {fields['largest_context']} tokens",
                     "[HARDWARE, RESOURCE_EXHAUSTED]"):
            self.assertIn(word, result.stderr)
        self.plan("--model", self.model, "--tokens", str(fields["largest_context"]))
        self.plan("--model", self.model, "--tokens", str(fields["largest_context"] + 1), code=4)
        self.plan("--model", self.model, "--tokens", "1048576", "--gpus", "3")

    def test_cpu(self):
        result = self.plan("--model", self.model, "--device", "cpu", code=2)
        for word in ("--memory", "got none", "CONFIG_INVALID"):
            self.assertIn(word, result.stderr)
        result = self.plan("--model", self.model, "--device", "cpu", "--ranks", "2", "--memory", "40GiB", "--json")
        fields = json.loads(result.stdout)
        self.assertEqual((2 * 8_044_936_192, 40 << 30, 0),
                         (fields["weight_bytes"], fields["memory_bytes"], fields["runtime_bytes"]))

    def test_scaled_rope(self):
        def window(*arguments):
            return json.loads(self.plan("--model", self.model, "--json", *arguments).stdout)["max_positions"]
        self.assertEqual(40960, window())
        self.assertEqual(40960, window("--rope-scaling", "none"))
        self.assertEqual(163840, window("--rope-scaling", "yarn:4"))
        self.assertEqual(131072, window("--rope-scaling", "yarn:4:32768"))
        for verb in ("plan", "serve"):
            result = refocus(verb, "--model", self.model, "--rope-scaling", "dynamic:2")
            self.assertEqual(2, result.returncode)
            self.assertIn("--rope-scaling: value: got 'dynamic:2', allowed none, or TYPE:FACTOR", result.stderr)

    def test_bad_models(self):
        (pathlib.Path(self.model) / "config.json").write_text(json.dumps({**self.CONFIG, "hidden_size": 0}))
        for model, words in ((self.model, "hidden size: got 0"), (self.model + "/absent", "No such file")):
            result = self.plan("--model", model, code=2)
            self.assertEqual("", result.stdout)
            self.assertIn(words, result.stderr)


if __name__ == "__main__":
    unittest.main()
