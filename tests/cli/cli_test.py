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
         ["adapt"], ["ask"], ["score"], ["tokenize"], ["status"], ["version"]]


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
                if verb[0] not in ("serve", "version"):
                    self.assertIn("(Env:REFOCUS_ADDRESS)", result.stdout)
                self.assertNotIn("Exit codes:", result.stdout)

    def test_defaults_and_units(self):
        text = refocus("adapt", "--help").stdout
        for word in ("Optimizer", "Spans", "Held-out spans", "Connection and output", "(32)", "(1e-5", "(128)",
                     "seconds", "nats"):
            self.assertIn(word, text)
        self.assertIn("127.0.0.1:7070", refocus("serve", "--help").stdout)

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


if __name__ == "__main__":
    unittest.main()
