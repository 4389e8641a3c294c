"""Installs the package as a user does, and looks for what must be in it.

Usage: install_test.py REPOSITORY TARGET, with the build's requirements on PYTHONPATH.
"""
import pathlib
import subprocess
import sys

repository, target = map(pathlib.Path, sys.argv[1:])
subprocess.run([sys.executable, "-B", repository / "deploy/python_package.py", repository, target], check=True)
for name in ("py.typed", "v1/context_pb2.py", "v1/context_pb2.pyi", "v1/error_details.binpb", "aio.py",
             "evaluate/tasks/bank.py", "evaluate/formats/prompts/longbench.json"):
    assert (target / "refocus" / name).is_file(), f"{name} is not in the package"
