"""Starts `refocus serve` on free ports and drives it with the command line, for tests. Nothing that it starts outlives
it.
"""
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

START_SECONDS = 90
SERVICE_PROCESSES = ("refocus", "refocus-coordinator", "refocus-worker", "mpirun", "orterun")


class Failed(AssertionError):
    pass


def wait_until(what, condition, seconds):
    """Polls until condition() is true and returns its value; Failed after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def descendants(pid):
    """Every living process below pid."""
    children = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def command_name(pid):
    try:
        return pathlib.Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""


class Service:
    """One running `refocus serve`; use as a context manager."""

    def __init__(self, bin_folder, model, ranks, *options, kv_memory="500MB"):
        self.bin = pathlib.Path(bin_folder)
        self.folder = tempfile.TemporaryDirectory()
        self.out = pathlib.Path(self.folder.name) / "out"
        self.err = pathlib.Path(self.folder.name) / "err"
        self.seen = set()  # pids that it ever had
        variables = {k: v for k, v in os.environ.items() if not k.startswith("REFOCUS_")}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [self.bin / "refocus", "serve", "--model", model, "--ranks", str(ranks), "--listen", "127.0.0.1:0",
                 *(["--kv-memory", kv_memory] if kv_memory else []), *options],
                stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=variables)
        self.variables = variables

    def __enter__(self):
        try:
            self.ready(1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind, *_):
        self.remember()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.seen:
            if alive(pid) and command_name(pid) in SERVICE_PROCESSES:
                os.kill(pid, signal.SIGKILL)
        if kind is not None:
            print("serve printed:\n" + self.log())
        self.folder.cleanup()

    def log(self):
        return self.out.read_text() + self.err.read_text()

    def remember(self):
        self.seen.update(descendants(self.process.pid))

    def ready(self, times, seconds=START_SECONDS):
        """Waits for the n-th "Ready" line."""
        def check():
            self.remember()
            lines = [line for line in self.out.read_text().splitlines() if line.startswith("Ready: ")]
            if len(lines) >= times:
                return lines[times - 1]
            if self.process.poll() is not None:
                raise Failed(f"serve ended with {self.process.returncode}:\n{self.log()}")
            return None
        line = wait_until(f"Ready line {times}", check, seconds)
        self.address = line.removeprefix("Ready: ").split(",")[0]
        self.variables["REFOCUS_ADDRESS"] = self.address
        return line

    def start(self, *arguments):
        """The command line in the background."""
        return subprocess.Popen([self.bin / "refocus", *map(str, arguments)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env=self.variables)

    def call(self, *arguments, code=0, timeout=120):
        """Runs the command line; its stdout, or (stdout, stderr) when it is expected to fail."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"no end after {timeout} s: refocus {' '.join(map(str, arguments))}") from None
        if process.returncode != code:
            words = " ".join(map(str, arguments))
            raise Failed(f"refocus {words}: exit code {process.returncode}, expected {code}\n{out}{err}")
        return out if code == 0 else (out, err)

    def events(self, *arguments):
        """The command line with --json: its lines as dictionaries."""
        return [json.loads(line) for line in self.call(*arguments, "--json").splitlines()]

    def cluster(self):
        return self.events("status")[0]

    def worker_pids(self):
        self.remember()
        return [int(rank["pid"]) for rank in sorted(self.cluster()["ranks"], key=lambda rank: rank["rank"])]

    def stop(self, seconds=60):
        """SIGTERM; the exit code. Failed if anything of it is left."""
        self.remember()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=seconds)
        self.expect_nothing_left()
        return code

    def expect_nothing_left(self, seconds=10):
        def none_left():
            return not [pid for pid in self.seen if alive(pid) and command_name(pid) in SERVICE_PROCESSES]
        wait_until(f"end of all processes of the service, left: {self.seen}", none_left, seconds)


def first_line(stream, matches, seconds=60):
    """Reads lines of a process' stream until one matches. A thread, so that a silent process cannot block the test."""
    found = []
    lines = []

    def read():
        for line in stream:
            lines.append(line)
            if matches(line):
                found.append(line)
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise Failed(f"no such line within {seconds} s; got: {''.join(lines)}")
    return found[0]
