"""Runs the commands of README.md. Usage: readme_test.py BIN_FOLDER REPOSITORY [unittest arguments]

Every ```sh block is run, in order, in one shell at the root of the repository, with free ports. Commands that build or
test the whole project are run by ctest's `demo` and `demo_novel` and by the build that this test is part of; here it is checked that
make knows them.
"""
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_ELSEWHERE = re.compile(r"^(\./setup|make( [\w-]+)?|\.ci/run)( +#.*)?$")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Readme(unittest.TestCase):
    def test_commands_run(self):
        blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        here = [line for line in lines if not RUN_ELSEWHERE.match(line)]
        for line in lines:
            if line.startswith("make"):
                target = line.split("#")[0].split()[1:]
                subprocess.run(["make", "--no-print-directory", "-n", *target], cwd=ROOT, check=True,
                               capture_output=True)
        self.assertTrue([line for line in here if "serve" in line], "README shows how to serve")
        self.assertTrue([line for line in lines if line.startswith("make demo")])
        self.assertTrue([line for line in lines if line.startswith("make test")])

        address = f"127.0.0.1:{free_port()}"
        environment = {**os.environ, "REFOCUS_ADDRESS": address, "REFOCUS_LISTEN": address,
                       "PATH": f"{BIN}:{os.environ['PATH']}"}
        script = "set -euo pipefail\n" + "\n".join(here) + "\n"
        script = script.replace("$PWD/build/release/bin", str(BIN))
        with tempfile.TemporaryFile("w+") as output:  # not a pipe: the server in the background would hold it open
            process = subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait(timeout=240)
            finally:
                servers = [pid for pid in self.of_session(process.pid) if harness.command_name(pid) == "refocus"]
                for pid in servers:
                    os.kill(pid, signal.SIGTERM)
                harness.wait_until("end of the server", lambda: not any(map(harness.alive, servers)), 60)
            output.seek(0)
            self.assertEqual(0, process.returncode, output.read())

    def of_session(self, session):
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getsid(int(entry.name)) == session:
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def test_verbs_and_exit_codes_are_described(self):
        for verb in ("serve", "eval", "context create", "context list", "context show", "context rm", "prefill", "adapt", "ask",
                     "score", "probe", "tokenize", "status", "version"):
            self.assertIn(f"refocus {verb}", README)
        for code in (0, 1, 2, 3, 4, 5, 130):
            self.assertRegex(README, rf"(?m)^\| {code} \|")


if __name__ == "__main__":
    unittest.main()
