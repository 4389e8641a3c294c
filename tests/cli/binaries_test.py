"""What the binaries link and export. Usage: binaries_test.py BIN_FOLDER WITH_CUDA [unittest
arguments]

LibTorch carries a protobuf of its own: the worker must export none of ours beside it. Processes that compute
nothing load no LibTorch and no MPI.
"""
import pathlib
import subprocess
import sys
import unittest

BIN = pathlib.Path(sys.argv.pop(1))
WITH_CUDA = sys.argv.pop(1) in ("ON", "1", "TRUE")
BINARIES = ("refocus", "refocus-coordinator", "refocus-worker")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Binaries(unittest.TestCase):
    def test_nothing_of_protobuf_or_grpc_is_exported(self):
        for name in BINARIES:
            exported = output("nm", "-D", "--defined-only", "--demangle", BIN / name)
            found = [line for line in exported.splitlines() if "google::protobuf" in line or "grpc" in line]
            self.assertEqual([], found[:3], name)

    def test_only_the_worker_loads_torch_and_mpi(self):
        for name in BINARIES:
            needed = output("readelf", "-d", BIN / name)
            self.assertIn("NEEDED", needed)
            for library in ("libtorch_cpu.so", "libc10.so", "libmpi.so"):
                (self.assertIn if name == "refocus-worker" else self.assertNotIn)(library, needed)
            for library in ("libgrpc", "libprotobuf", "libtorch_python"):
                self.assertNotIn(library, needed)
            # Nothing names a symbol of it; without it LibTorch would know no CUDA device.
            gpu = WITH_CUDA and name == "refocus-worker"
            (self.assertIn if gpu else self.assertNotIn)("libtorch_cuda.so", needed)


if __name__ == "__main__":
    unittest.main()
