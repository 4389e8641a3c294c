"""The service on GPUs, through the command line: a real model on a novel against the CPU's answers, ranks that are killed
or frozen, ranks that start without mpirun, and a context of a million tokens. Skipped, with the reason, without a GPU.

Usage: gpu_test.py BIN_FOLDER REPOSITORY [unittest arguments]

REFOCUS_MILLION_LAYERS (4) is the depth of the model with a million tokens, REFOCUS_BESIDE_SECONDS (30) how long short
requests are asked beside the prefill of such a context; more takes longer.
"""
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import harness

SKIP = 77
BIN = pathlib.Path(sys.argv.pop(1)).resolve()
ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
MODEL = ROOT / ".deps/data/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / ".deps/data/novels/persuasion.txt"
REPORT_SECONDS = 10
QWEN3_4B = json.loads((ROOT / "bench/shapes/qwen3-4b/config.json").read_text())


def gpus():
    """Names of the visible GPUs."""
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return found.stdout.strip().splitlines() if found.returncode == 0 else []


GPUS = gpus()


def error_line(err):
    return [line for line in err.splitlines() if line.startswith("refocus ")][-1]


class Folder(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def model(self, layers):
        """A folder with nothing but a configuration, for --random-weights."""
        folder = pathlib.Path(self.folder.name) / f"qwen3-4b-{layers}-layers"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN3_4B | {"num_hidden_layers": layers}))
        return folder

    def ids(self, count):
        path = pathlib.Path(self.folder.name) / f"{count}.ids"
        generator = random.Random(count)
        path.write_text(" ".join(str(generator.randrange(150_000)) for _ in range(count)))
        return path


@unittest.skipUnless(MODEL.exists() and TEXT.exists(), "run ./setup for the model and the novels")
class RealModel(unittest.TestCase):
    """The CPU ranks compute in fp32: the GPUs' bf16 must say nearly the same of a novel."""

    def read_and_adapt(self, device, ranks):
        with harness.Service(BIN, MODEL, ranks, "--device", device) as service:
            service.call("context", "create", TEXT, "--id", "novel", "--max-tokens", "4000")
            later = ["--target-file", TEXT, "--skip-bytes", "20000", "--max-bytes", "3000"]
            base = service.events("score", "novel", "--base", *later)[-1]
            adapt = service.events("adapt", "novel", "--steps", "16", "--learning-rate", "1e-4", "--seed", "1")[-1]
            adapted = service.events("score", "novel", *later)[-1]
            answer = service.call("ask", "novel", "She was", "--max-tokens", "24")
            self.assertEqual(0, service.stop())
        tokens = int(base["token_count"])
        result = {"base": base["sum_logprob"] / tokens, "adapted": adapted["sum_logprob"] / tokens,
                  "seconds": adapt["usage"]["seconds"]}
        print(f"{device} x {ranks}: log-probability of {tokens} later tokens {result['base']:.4f} base, "
              f"{result['adapted']:.4f} adapted; 16 steps in {result['seconds']:.2f} s; {answer.strip()!r}", flush=True)
        return result

    def test_as_on_the_cpu(self):
        cpu = self.read_and_adapt("cpu", 1)
        for ranks in range(1, len(GPUS) + 1):
            gpu = self.read_and_adapt("cuda", ranks)
            self.assertAlmostEqual(cpu["base"], gpu["base"], delta=0.01)
            self.assertAlmostEqual(cpu["adapted"], gpu["adapted"], delta=0.01)


@unittest.skipUnless(len(GPUS) >= 2, f"needs 2 GPUs, found {len(GPUS)}")
class LostRank(Folder):
    """One rank of two is lost in the three kinds of work: callers know within 10 s, the group comes back."""

    def lose(self, service, number, work, stream, has_begun, signal_number, says):
        pids = service.worker_pids()
        process = service.start(*work)
        harness.first_line(getattr(process, stream), has_begun)
        self.assertIsNone(process.poll(), "the work ended before: make it longer")
        os.kill(pids[-1], signal_number)
        lost = time.monotonic()
        _, err = process.communicate(timeout=60)
        seconds = time.monotonic() - lost
        self.assertLess(seconds, REPORT_SECONDS)
        self.assertEqual(1, process.returncode, err)
        self.assertIn("[WORKER_LOST, UNAVAILABLE]", error_line(err))
        self.assertIn(says, err)
        service.ready(number + 1, 90)
        again = time.monotonic() - lost
        print(f"{work[0]}, signal {signal_number}: the caller knew after {seconds:.1f} s, served again after {again:.1f} s",
              flush=True)
        self.assertFalse([pid for pid in pids if harness.alive(pid)])

    def test_killed_and_frozen(self):
        options = ["--device", "cuda", "--random-weights", "1", "--stuck-seconds", "4"]
        with harness.Service(BIN, self.model(36), 2, *options, kv_memory="40GB") as service:
            long, short = self.ids(400_000), self.ids(3000)
            self.lose(service, 1, ["context", "create", long, "--ids", "--id", "long"], "stderr",
                      lambda line: line.startswith("prefill: ") and not line.startswith("prefill: 0/"),
                      signal.SIGKILL, "rank 1")
            service.call("context", "rm", "long")
            service.call("context", "create", short, "--ids", "--id", "short")
            adapt = ["adapt", "short", "--steps", "5000", "--learning-rate", "1e-6", "--max-probe-rise", "100"]
            self.lose(service, 2, adapt, "stderr", lambda line: line.startswith("step "), signal.SIGKILL, "rank 1")
            service.call("prefill", "short")
            self.lose(service, 3, ["ask", "short", "1 2 3", "--ids", "--max-tokens", "4000", "--ignore-eos", "--json"],
                      "stdout", lambda line: '"token_ids":[' in line, signal.SIGKILL, "rank 1")
            service.call("prefill", "short")
            self.lose(service, 4, adapt, "stderr", lambda line: line.startswith("step "), signal.SIGSTOP,
                      "rank 1 is silent")
            service.call("prefill", "short")
            service.call("ask", "short", "1 2 3", "--ids", "--max-tokens", "4")
            self.assertEqual(0, service.stop())


class WithoutMpirun(Folder):
    def test_ranks_that_start_by_themselves(self):
        folder = pathlib.Path(self.folder.name)
        variables = {k: v for k, v in os.environ.items() if not k.startswith("REFOCUS_")}
        started = []
        try:
            with open(folder / "coordinator.out", "wb") as out:
                started.append(subprocess.Popen(
                    [BIN / "refocus-coordinator", "--model", self.model(2), "--ranks", str(len(GPUS)), "--listen",
                     "127.0.0.1:17070", "--worker-listen", "127.0.0.1:17071"], stdout=out, stderr=out, env=variables))
            for rank in range(len(GPUS)):
                started.append(subprocess.Popen(
                    [BIN / "refocus-worker", "--device", "cuda", "--model", self.model(2), "--random-weights", "1",
                     "--kv-memory", "8GB", "--group-size", str(len(GPUS)), "--group-name", "test", "--coordinator",
                     "127.0.0.1:17071"], env=variables | {"CUDA_VISIBLE_DEVICES": str(rank)}))
            variables["REFOCUS_ADDRESS"] = "127.0.0.1:17070"

            def call(*arguments):
                return subprocess.run([BIN / "refocus", *map(str, arguments)], env=variables, check=True, text=True,
                                      capture_output=True, timeout=90).stdout

            call("status", "--wait", "60")
            call("context", "create", self.ids(2000), "--ids", "--id", "c")
            call("adapt", "c", "--steps", "3")
            answer = json.loads(call("ask", "c", "1 2 3", "--ids", "--max-tokens", "5", "--json").splitlines()[-1])
            self.assertEqual(5, int(answer["summary"]["generated_tokens"]))
            started[0].send_signal(signal.SIGTERM)
            self.assertEqual([0] * len(started), [process.wait(timeout=60) for process in started])
        finally:
            for process in started:
                process.kill()
            if sys.exc_info()[0] is not None:
                print((folder / "coordinator.out").read_text())


class Million(Folder):
    def test_a_million_tokens(self):
        layers = int(os.environ.get("REFOCUS_MILLION_LAYERS", "4"))
        tokens = 1 << 20
        with harness.Service(BIN, self.model(layers), len(GPUS), "--device", "cuda", "--random-weights", "1",
                             kv_memory=None) as service:
            ids = self.ids(tokens)
            begin = time.monotonic()
            process = service.start("context", "create", ids, "--ids", "--id", "million", "--json")
            out, err = process.communicate(timeout=540)
            self.assertEqual(0, process.returncode, err)
            self.assertGreater(len([line for line in err.splitlines() if line.startswith("prefill: ")]), 2, "no progress")
            whole = time.monotonic() - begin
            prefill = json.loads(out.splitlines()[-1])["usage"]
            self.assertEqual(tokens, int(prefill["tokens"]))
            adapt = service.events("adapt", "million", "--steps", "32", "--seed", "1")[-1]["usage"]
            answer = service.events("ask", "million", "1 2 3", "--ids", "--max-tokens", "64", "--ignore-eos")[-1]["summary"]
            self.assertEqual(64, int(answer["generated_tokens"]))
            print(f"{tokens} tokens, Qwen3-4B shape with {layers} layers, {len(GPUS)} x {GPUS[0]}:\n"
                  f"| upload and prefill | {whole:.2f} s |\n| prefill | {prefill['seconds']:.2f} s |\n"
                  f"| 32 steps of 128 tokens, with probes | {adapt['seconds']:.2f} s |\n"
                  f"| decode | {answer['tokens_per_second']:.1f} tokens/s |", flush=True)
            self.assertEqual(0, service.stop())

    def test_short_requests_beside_its_prefill(self):
        """A request waits for the chunk that runs, never for the prefill."""
        limit = float(os.environ.get("REFOCUS_BESIDE_SECONDS", "30"))
        with harness.Service(BIN, self.model(36), len(GPUS), "--device", "cuda", "--random-weights", "1",
                             kv_memory=None) as service:
            service.call("context", "create", self.ids(3000), "--ids", "--id", "short")
            service.call("ask", "short", "1 2 3", "--ids", "--max-tokens", "1")
            controller, terminal = os.openpty()  # on a terminal every chunk is shown, in a pipe one line now and then
            prefill = subprocess.Popen(
                [BIN / "refocus", "context", "create", self.ids(1 << 20), "--ids", "--id", "long"], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=terminal, env=service.variables | {"TERM": "xterm", "NO_COLOR": "1"})
            os.close(terminal)
            chunks, firsts = [], []  # (end, seconds) of a chunk, (begin, seconds) until a first token

            def watch():
                last = last_time = None
                text = b""
                while True:
                    try:
                        text = text[-200:] + os.read(controller, 4096)
                    except OSError:  # the terminal's other end is closed
                        return
                    done = re.findall(rb"prefill \[[#.]*\] (\S+)/", text)
                    if done and done[-1] != last:
                        now = time.monotonic()
                        if last is not None:
                            chunks.append((now, now - last_time))
                        last, last_time = done[-1], now

            thread = threading.Thread(target=watch, daemon=True)
            thread.start()
            harness.wait_until("progress of the prefill", lambda: chunks, 60)
            end = time.monotonic() + limit
            while time.monotonic() < end and prefill.poll() is None:
                begin = time.monotonic()
                service.call("ask", "short", "1 2 3", "--ids", "--max-tokens", "1")
                firsts.append((begin, time.monotonic() - begin))
                time.sleep(0.3)
            self.assertIsNone(prefill.poll(), "the prefill ended before: nothing was measured beside it")
            prefill.send_signal(signal.SIGINT)
            prefill.wait(timeout=60)
            thread.join(timeout=10)
            os.close(controller)
            # Of each request: the longest chunk that ran in its time.
            shares = [(seconds / longest, seconds, longest) for begin, seconds in firsts
                      if (longest := max((length for stop, length in chunks
                                          if stop - length < begin + seconds and stop > begin), default=None))]
            self.assertGreater(len(shares), 5)
            shares.sort()
            worst = shares[-1]
            print(f"{len(shares)} requests beside the prefill of {1 << 20} tokens, {len(GPUS)} x {GPUS[0]}: first token and end "
                  f"of the process after {shares[len(shares) // 2][0]:.2f} chunks (median), at worst {worst[0]:.2f} "
                  f"({worst[1]:.2f} s beside a chunk of {worst[2]:.2f} s); chunks {min(c for _, c in chunks):.2f} to "
                  f"{max(c for _, c in chunks):.2f} s", flush=True)
            self.assertLess(worst[1], 1.5 * worst[2] + 0.5, "0.5 s: the process that asks, and what its request takes itself")
            self.assertEqual(0, service.stop())


if __name__ == "__main__":
    if not GPUS:
        print("skipped: no GPU (nvidia-smi finds none)")
        sys.exit(SKIP)
    unittest.main(verbosity=2)
