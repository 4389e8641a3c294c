"""`refocus eval` hands over to the package. Usage: evaluate_cli_test.py BIN_FOLDER, with the package on PYTHONPATH."""
import os
import pathlib
import subprocess
import sys
import unittest

BIN = pathlib.Path(sys.argv.pop(1))


def run(*arguments, **environment):
    return subprocess.run([BIN / "refocus", "eval", *arguments], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "REFOCUS_PYTHON": sys.executable, **environment})


class Eval(unittest.TestCase):
    def test_arguments_go_through(self):
        result = run("list")
        self.assertEqual(0, result.returncode, result.stderr)
        self.assertIn("niah_single_1", result.stdout)
        result = run("run", "--help")
        self.assertEqual(0, result.returncode, result.stderr)
        self.assertIn("--methods", result.stdout)
        result = run("run", "--tasks", "ledger", "--methods", "guess", "--out", "/nowhere")
        self.assertEqual((2, 1), (result.returncode, len(result.stderr.splitlines())), result.stderr)
        self.assertIn("'guess'", result.stderr)

    def test_without_the_package(self):
        result = run("list", PYTHONPATH="", PYTHONNOUSERSITE="1")
        self.assertEqual(2, result.returncode)
        self.assertEqual(1, len(result.stderr.splitlines()), result.stderr)
        self.assertIn("pip install ./python", result.stderr)

    def test_without_python(self):
        result = run("list", REFOCUS_PYTHON="/nowhere/python3")
        self.assertEqual(2, result.returncode)
        self.assertRegex(result.stderr, r"^refocus eval: cannot start /nowhere/python3: No such file")

    def test_help(self):
        result = run("--help")
        self.assertEqual(0, result.returncode)
        self.assertIn("docs/evaluation.md", result.stdout)


if __name__ == "__main__":
    unittest.main()
