"""Ranks, launcher, coordinator and supervisor are killed while a real model works: callers learn the cause within 10 s,
health turns, the group comes back, and nothing outlives the service.

Usage: failure_test.py BIN_FOLDER REPOSITORY [unittest arguments]
"""
import os
import pathlib
import signal
import sys
import tempfile
import time
import unittest

import harness

BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
GOLDEN = ROOT / "tests/golden/llama"
MODEL = ROOT / ".deps/data/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / ".deps/data/novels/persuasion.txt"
RANKS = 2
REPORT_SECONDS = 10


class KilledRank(unittest.TestCase):
    """kill -9 of a rank in the three kinds of work, one after the other on one service."""

    @classmethod
    def setUpClass(cls):
        cls.service = harness.Service(BIN, MODEL, RANKS).__enter__()
        cls.rebuilt = 1

    @classmethod
    def tearDownClass(cls):
        try:
            code = cls.service.stop()
        finally:
            cls.service.__exit__(None, None, None)
        if code != 0:
            raise harness.Failed(f"serve ended with {code}")

    def kill_during(self, work, stream, has_begun):
        """Kills the last rank once the work has begun; checks what its caller and everybody else learn."""
        pids = self.service.worker_pids()
        self.assertEqual(RANKS, len(pids))
        epoch = int(self.service.cluster()["epoch"])
        process = self.service.start(*work)
        harness.first_line(getattr(process, stream), has_begun)
        self.assertIsNone(process.poll(), "the work ended before the kill: make it longer")
        os.kill(pids[-1], signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)
        self.assertLess(time.monotonic() - killed, REPORT_SECONDS)
        self.assertEqual(1, process.returncode, err)
        error = [line for line in err.splitlines() if line.startswith("refocus ")][-1]
        self.assertIn("[WORKER_LOST, UNAVAILABLE]", error)
        self.assertIn("rank 1", err)

        out, _ = self.service.call("status", "--health", code=1)
        self.assertEqual("NOT_SERVING\n", out)
        type(self).rebuilt += 1
        self.service.ready(self.rebuilt, 60)
        self.assertEqual("SERVING\n", self.service.call("status", "--health"))
        cluster = self.service.cluster()
        self.assertGreater(int(cluster["epoch"]), epoch)
        self.assertIn("rank 1", cluster["last_incident"])
        self.assertFalse(set(pids) & set(self.service.worker_pids()))

    def check_context_comes_back(self, name):
        shown, = self.service.events("context", "show", name)
        self.assertEqual("CREATED", shown["state"])
        self.assertNotEqual("", shown["state_reason"])
        self.assertEqual([], shown["adapters"])
        self.service.call("prefill", name)
        self.assertNotEqual("", self.service.call("ask", name, "He said", "--max-tokens", "4").strip())

    def test_1_prefill(self):
        self.kill_during(["context", "create", TEXT, "--id", "long", "--max-tokens", "6000"], "stderr",
                         lambda line: line.startswith("prefill: ") and not line.startswith("prefill: 0/"))
        self.service.call("context", "rm", "long")
        self.service.call("context", "create", TEXT, "--id", "short", "--max-tokens", "300")

    def test_2_adapt(self):
        work = ["adapt", "short", "--steps", "2000", "--learning-rate", "1e-5", "--max-probe-rise", "100"]
        self.kill_during(work, "stderr", lambda line: line.startswith("step "))
        self.check_context_comes_back("short")

    def test_3_generate(self):
        self.kill_during(["ask", "short", "And", "--max-tokens", "4000", "--ignore-eos", "--json"], "stdout",
                         lambda line: '"token_ids":[' in line)
        self.check_context_comes_back("short")


class FrozenRank(unittest.TestCase):
    """SIGSTOP of a rank: its process, its connections and mpirun live on, but its work stands still."""

    def test_while_adapting(self):
        with harness.Service(BIN, GOLDEN, RANKS, "--threads-per-rank", "1", "--stuck-seconds", "3.5") as service:
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(" ".join(map(str, range(200))))
                file.flush()
                service.call("context", "create", file.name, "--ids", "--id", "c")
            old = service.worker_pids()
            process = service.start("adapt", "c", "--steps", "10000", "--learning-rate", "1e-6", "--span-tokens", "32",
                                    "--max-probe-rise", "100")
            harness.first_line(process.stderr, lambda line: line.startswith("step "))
            os.kill(old[-1], signal.SIGSTOP)
            frozen = time.monotonic()
            _, err = process.communicate(timeout=30)
            self.assertLess(time.monotonic() - frozen, REPORT_SECONDS)
            self.assertEqual(1, process.returncode, err)
            error = [line for line in err.splitlines() if line.startswith("refocus ")][-1]
            self.assertIn("[WORKER_LOST, UNAVAILABLE]", error)
            self.assertIn("rank 1 is silent and made no progress", err)
            service.ready(2, 60)
            self.assertEqual("SERVING\n", service.call("status", "--health"))
            self.assertFalse([pid for pid in old if harness.alive(pid)])
            self.assertIn("rank 1", service.cluster()["last_incident"])
            service.call("prefill", "c")
            service.call("ask", "c", "1 2 3", "--ids", "--max-tokens", "3")
            self.assertEqual(0, service.stop())


class Supervision(unittest.TestCase):
    def test_sigterm_while_generating_drains(self):
        with harness.Service(BIN, MODEL, RANKS, "--drain-seconds", "2") as service:
            service.call("context", "create", TEXT, "--id", "c", "--max-tokens", "200")
            process = service.start("ask", "c", "And", "--max-tokens", "4000", "--ignore-eos", "--json")
            harness.first_line(process.stdout, lambda line: '"token_ids":[' in line)
            self.assertEqual(0, service.stop(30))
            _, err = process.communicate(timeout=10)
            self.assertEqual(1, process.returncode)
            self.assertRegex(err, r"\[(DRAINING, UNAVAILABLE|.*CANCELLED|.*UNAVAILABLE)\]")

    def test_coordinator_killed_while_draining(self):
        with harness.Service(BIN, MODEL, RANKS, "--drain-seconds", "60") as service:
            service.call("context", "create", TEXT, "--id", "c", "--max-tokens", "50")
            process = service.start("ask", "c", "And", "--max-tokens", "4000", "--ignore-eos", "--json")
            harness.first_line(process.stdout, lambda line: '"token_ids":[' in line)
            service.remember()
            coordinator, = [pid for pid in service.seen if harness.command_name(pid) == "refocus-coordinator"]
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            self.assertIsNone(service.process.poll())
            os.kill(coordinator, signal.SIGKILL)
            self.assertEqual(1, service.process.wait(timeout=30), service.log())
            service.expect_nothing_left()
            process.communicate(timeout=10)

    def test_killed_launcher(self):
        with harness.Service(BIN, MODEL, RANKS) as service:
            old = service.worker_pids()
            launcher, = [pid for pid in service.seen if harness.command_name(pid) in ("orterun", "mpirun")]
            os.kill(launcher, signal.SIGKILL)
            service.ready(2, 60)
            self.assertFalse([pid for pid in old if harness.alive(pid)])
            service.call("context", "create", TEXT, "--id", "c", "--max-tokens", "50")
            self.assertEqual(0, service.stop())

    def test_killed_coordinator(self):
        with harness.Service(BIN, MODEL, RANKS) as service:
            service.remember()
            coordinator, = [pid for pid in service.seen if harness.command_name(pid) == "refocus-coordinator"]
            os.kill(coordinator, signal.SIGKILL)
            self.assertEqual(1, service.process.wait(timeout=30))
            service.expect_nothing_left()

    def test_killed_supervisor(self):
        with harness.Service(BIN, MODEL, RANKS) as service:
            service.remember()
            service.process.kill()
            service.process.wait()
            service.expect_nothing_left(20)

    def test_second_signal_ends_at_once(self):
        with harness.Service(BIN, MODEL, RANKS, "--drain-seconds", "600") as service:
            service.call("context", "create", TEXT, "--id", "c", "--max-tokens", "200")
            process = service.start("ask", "c", "And", "--max-tokens", "4000", "--ignore-eos", "--json")
            harness.first_line(process.stdout, lambda line: '"token_ids":[' in line)
            service.remember()
            service.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            self.assertIsNone(service.process.poll())
            service.process.send_signal(signal.SIGINT)
            self.assertEqual(130, service.process.wait(timeout=15))
            service.expect_nothing_left()
            process.communicate(timeout=10)


if __name__ == "__main__":
    unittest.main()
