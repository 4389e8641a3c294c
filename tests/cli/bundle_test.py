"""The installed folder, moved elsewhere: what its programs name and export, what the worker's launcher says when
something is missing, and a small job on the CPU.

Usage: bundle_test.py CMAKE BUILD_FOLDER REPOSITORY TORCH_ROOT WITH_CUDA [unittest arguments]. A build with CUDA starts
only where all libraries of torch's CUDA part are: elsewhere the tests that run the worker are skipped.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

CMAKE, BUILD, ROOT, TORCH = (pathlib.Path(sys.argv.pop(1)) for _ in range(4))
WITH_CUDA = sys.argv.pop(1) in ("ON", "1", "TRUE")
sys.path.insert(0, str(ROOT / "tests/e2e"))
import harness  # noqa: E402

PROGRAMS = ("bin/refocus", "bin/refocus-coordinator", "libexec/refocus-worker")
VERSION = "2.11.0+cu130" if WITH_CUDA else "2.11.0"
RANKS_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.work = pathlib.Path(cls.folder.name)
        output(CMAKE, "--install", BUILD, "--prefix", cls.work / "first")
        cls.bundle = cls.work / "a place" / "elsewhere"
        cls.bundle.parent.mkdir()
        (cls.work / "first").rename(cls.bundle)
        cls.worker = cls.bundle / "bin/refocus-worker"
        said = cls.run_with({"REFOCUS_TORCH_ROOT": str(TORCH)}, "--version")
        missing = re.search(r"missing libraries: (.*); CUDA 13 libraries come", said.stderr)
        cls.cannot_run = f"of torch's CUDA libraries this machine lacks {missing[1]}" if WITH_CUDA and missing else ""

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def run_with(cls, variables, *arguments, program=None):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("REFOCUS_")}
        return subprocess.run([program or cls.worker, *arguments], capture_output=True, text=True, timeout=60,
                              stdin=subprocess.DEVNULL, env={**environment, **variables}, check=False)

    def need_worker(self):
        if self.cannot_run:
            self.skipTest(self.cannot_run)

    def make_torch(self, name, version=VERSION, files=("libtorch_cpu.so",)):
        """A folder that looks like an installed torch, with some of its libraries."""
        root = self.work / name
        (root / "lib").mkdir(parents=True)
        (root / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
        for file in files:
            (root / "lib" / file).symlink_to(TORCH / "lib" / file)
        return root

    def refused(self, variables, *words, program=None, arguments=("--version",)):
        """One line, exit code 2, nothing of the loader's."""
        result = self.run_with(variables, *arguments, program=program)
        self.assertEqual((2, ""), (result.returncode, result.stdout), result.stderr)
        self.assertEqual(1, result.stderr.count("\n"), result.stderr)
        self.assertTrue(result.stderr.startswith("refocus-worker: "), result.stderr)
        for word in (*words, "[CONFIG_INVALID]"):
            self.assertIn(word, result.stderr)
        self.assertNotIn("error while loading", result.stderr)

    def test_what_is_in_it(self):
        files = sorted(str(path.relative_to(self.bundle)) for path in self.bundle.rglob("*") if path.is_file())
        self.assertEqual(sorted([*PROGRAMS, "bin/refocus-worker", "README.txt"]),
                         [file for file in files if not file.startswith("licenses/")])
        self.assertIn("licenses/libgrpc-dev.txt", files)

    def test_programs_are_stripped_and_name_no_folder_of_this_machine(self):
        for name in PROGRAMS:
            self.assertNotRegex(output("readelf", "-d", self.bundle / name), r"R(UN)?PATH", name)
            self.assertNotIn(".symtab", output("readelf", "-SW", self.bundle / name), name)
            needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", self.bundle / name))
            self.assertIn("libc.so.6", needed)
            self.assertEqual([], [library for library in needed if "/" in library], name)
        self.assertNotIn(str(ROOT.resolve()), self.worker.read_text())
        self.assertNotIn(str(TORCH), self.worker.read_text())

    def test_nothing_of_protobuf_or_grpc_is_exported(self):
        for name in PROGRAMS:
            exported = output("nm", "-D", "--defined-only", "--demangle", self.bundle / name)
            found = [line for line in exported.splitlines() if "google::protobuf" in line or "grpc" in line]
            self.assertEqual([], found[:3], name)

    def test_the_worker_needs_what_the_build_has(self):
        needed = output("readelf", "-d", self.bundle / "libexec/refocus-worker")
        for library in ("libtorch_cuda.so", "libc10_cuda.so", "libnccl.so.2", "libcudart.so.13"):
            (self.assertIn if WITH_CUDA else self.assertNotIn)(f"[{library}]", needed)

    def test_programs_without_torch(self):
        for name, flags in (("refocus", ("version", "--help")), ("refocus-coordinator", ("--version", "--help"))):
            for flag in flags:
                result = self.run_with({}, flag, program=self.bundle / "bin" / name)
                self.assertEqual((0, ""), (result.returncode, result.stderr))
                self.assertIn("refocus", result.stdout)

    def test_torch_is_nowhere(self):
        # A python3 that knows no torch; a folder of this name in the current one does not count.
        empty = self.work / "no python"
        empty.mkdir()
        (empty / "python3").write_text("#!/bin/sh\nexit 1\n")
        (empty / "python3").chmod(0o755)
        self.refused({"PATH": f"{empty}:{os.environ['PATH']}"}, "torch 2.11.0 is not there", "REFOCUS_TORCH_ROOT")

    def test_torch_is_the_wrong_one(self):
        self.refused({"REFOCUS_TORCH_ROOT": "/no/such"}, "got the folder '/no/such'", "lib/libtorch_cpu.so")
        for number, version in enumerate(("2.10.0+cu130", "2.11.0a0+cu130", "2.11.01", "")):
            root = self.make_torch(f"version {number}", version, ("libtorch_cpu.so", "libtorch_cuda.so"))
            self.refused({"REFOCUS_TORCH_ROOT": str(root)}, f"got version '{version or 'unknown'}'", f"allowed {VERSION}")
        for number, (version, files) in enumerate((("2.11.0+cu128", ("libtorch_cpu.so", "libtorch_cuda.so")),
                                                   ("2.11.0+cpu", ("libtorch_cpu.so",)),
                                                   ("2.11.0", ("libtorch_cpu.so",)))):
            if WITH_CUDA:
                root = self.make_torch(f"cuda {number}", version, files)
                self.refused({"REFOCUS_TORCH_ROOT": str(root)}, f"got version '{version}'", "allowed 2.11.0+cu130")

    def test_libraries_are_missing(self):
        root = self.make_torch("incomplete", files=("libtorch_cpu.so", "libtorch_cuda.so"))
        self.refused({"REFOCUS_TORCH_ROOT": str(root)}, "missing libraries: ", "libc10.so", "install torch 2.11.0 anew")

    def link_stand_in(self, name, libraries, version=""):
        """A folder with the launcher and, for the worker, a program that was linked against `libraries`; they are then
        removed, or, with a version, get another one."""
        folder = self.work / name
        for part in ("bin", "libexec", "stubs"):
            (folder / part).mkdir(parents=True)
        shutil.copy(self.worker, folder / "bin")
        script = folder / "stubs/versions"
        script.write_text(f"{version} {{ global: *; }};\n")
        stubs = []
        for number, library in enumerate(libraries):
            source, stub = folder / f"stubs/{number}.c", folder / "stubs" / library
            source.write_text(f"int stub_{number}(void) {{ return 0; }}\n")
            build = ["cc", "-shared", "-fPIC", "-o", stub, f"-Wl,-soname,{library}", source]
            output(*build, *([f"-Wl,--version-script={script}"] if version else []))
            stubs.append((stub, build))
        calls = [f"stub_{number}" for number in range(len(libraries))]
        source = folder / "stubs/main.c"
        source.write_text("".join(f"int {call}(void);\n" for call in calls) +
                          f"int main(void) {{ return {' + '.join(call + '()' for call in calls)}; }}\n")
        output("cc", "-o", folder / "libexec/refocus-worker", source, *(stub for stub, _ in stubs))
        for stub, build in stubs:
            stub.unlink()
            if version:
                script.write_text("ANOTHER { global: *; };\n")
                output(*build, f"-Wl,--version-script={script}")
        return folder / "bin/refocus-worker"

    def test_every_missing_library_gets_advice(self):
        root = str(self.make_torch("whole", files=("libtorch_cpu.so", "libtorch_cuda.so")))
        for number, (libraries, words) in enumerate((
                (["libmpi.so.41"], ["missing libraries: libmpi.so.41; install Open MPI 4.1", "openmpi-bin"]),
                (["libmpi.so.41", "libcudnn.so.90"], ["libcudnn.so.90", "; CUDA 13 libraries come"]),
                (["libodd.so.1"], ["missing libraries: libodd.so.1; install them, or"]))):
            program = self.link_stand_in(f"stand-in {number}", libraries)
            self.refused({"REFOCUS_TORCH_ROOT": root}, *words, program=program)
        program = self.link_stand_in("old", ["libold.so.1"], "OLD_2.99")
        self.refused({"REFOCUS_TORCH_ROOT": root, "LD_LIBRARY_PATH": str(program.parent.parent / "stubs")},
                     "version `OLD_2.99'", "older than the one", program=program)
        (program.parent.parent / "libexec/refocus-worker").unlink()
        self.refused({"REFOCUS_TORCH_ROOT": root}, "unpack the whole bundle", program=program)

    def test_of_several_ranks_one_speaks(self):
        result = self.run_with({**RANKS_AS_ROOT, "REFOCUS_TORCH_ROOT": "/no/such"}, "--oversubscribe", "-np", "3",
                               self.worker, "--version", program="mpirun")
        self.assertEqual(2, result.returncode)
        self.assertEqual(1, result.stderr.count("refocus-worker: torch: "), result.stderr)
        self.assertNotIn("error while loading", result.stderr)

    def test_serve_ends_when_its_workers_cannot_start(self):
        result = self.run_with({"REFOCUS_TORCH_ROOT": "/no/such"}, "serve", "--model", ROOT / "tests/golden/llama",
                               "--ranks", "2", "--listen", "127.0.0.1:0", program=self.bundle / "bin/refocus")
        self.assertEqual(2, result.returncode, result.stderr)
        self.assertEqual(1, result.stderr.count("refocus-worker: torch: got the folder '/no/such'"), result.stderr)
        self.assertNotIn("error while loading", result.stderr)

    def test_serve_without_mpirun(self):
        result = self.run_with({"PATH": "/no/such"}, "serve", "--model", ROOT / "tests/golden/llama",
                               program=self.bundle / "bin/refocus")
        self.assertEqual((2, 1), (result.returncode, result.stderr.count("\n")), result.stderr)
        self.assertIn("mpirun: not on PATH; install Open MPI 4.1", result.stderr)

    def test_help_and_version_of_the_worker(self):
        self.need_worker()
        link = self.work / "linked-worker"
        link.symlink_to(self.worker)
        for program in (self.worker, link):
            result = self.run_with({"REFOCUS_TORCH_ROOT": str(TORCH)}, "--version", program=program)
            self.assertEqual((0, ""), (result.returncode, result.stderr))
            self.assertRegex(result.stdout, r"^refocus-worker \d")
        result = self.run_with({"REFOCUS_TORCH_ROOT": str(TORCH)}, "--help")
        self.assertEqual(0, result.returncode, result.stderr)
        self.assertIn("--device", result.stdout)
        result = self.run_with({**RANKS_AS_ROOT, "REFOCUS_TORCH_ROOT": str(TORCH)}, "--oversubscribe", "-np", "2",
                               self.worker, "--version", program="mpirun")
        self.assertEqual((0, 1), (result.returncode, result.stdout.count("refocus-worker ")), result.stderr)

    def test_python_says_where_torch_is(self):
        self.need_worker()
        site = self.work / "site"
        site.mkdir()
        (site / "torch").symlink_to(TORCH)
        result = self.run_with({"PYTHONPATH": str(site)}, "--version")
        self.assertEqual((0, ""), (result.returncode, result.stderr))

    def test_a_job_on_two_ranks(self):
        self.need_worker()
        (self.bundle / "lib").mkdir()
        (self.bundle / "lib/torch").symlink_to(TORCH)
        self.addCleanup(shutil.rmtree, self.bundle / "lib")
        golden = json.loads((ROOT / "tests/golden/llama.golden.json").read_text())
        want = golden["answers"]["base.question"]
        with harness.Service(self.bundle / "bin", ROOT / "tests/golden/llama", 2, "--device", "cpu", "--check-finite",
                             "--threads-per-rank", "1") as service:
            context = self.work / "context.ids"
            context.write_text(" ".join(map(str, golden["context"])))
            service.call("context", "create", context, "--id", "golden", "--ids")
            question = " ".join(map(str, want["question"]))
            events = service.events("ask", "golden", question, "--ids", "--max-tokens", len(want["tokens"]),
                                    "--ignore-eos", "--base")
            self.assertEqual(want["tokens"], [int(token) for event in events for token in event["token_ids"]])
            self.assertEqual(0, service.stop())


if __name__ == "__main__":
    unittest.main()
