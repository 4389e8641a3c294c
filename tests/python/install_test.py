"""Installs the package as `pip install ./python` does, from a copy of the sources, without fetching anything.

Usage: install_test.py REPOSITORY TARGET, with the build's requirements on PYTHONPATH.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

repository, target = map(pathlib.Path, sys.argv[1:])
shutil.rmtree(target, ignore_errors=True)
with tempfile.TemporaryDirectory() as folder:  # pip builds in the source's folder
    for name in ("python", "proto"):
        shutil.copytree(repository / name, pathlib.Path(folder) / name,
                        ignore=shutil.ignore_patterns("build", "*.egg-info", "*_pb2.py*", "*.binpb", "__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
                    "--no-deps", "--no-build-isolation", "--root-user-action", "ignore", "--target", target,
                    pathlib.Path(folder) / "python"], check=True)
for name in ("py.typed", "v1/context_pb2.py", "v1/context_pb2.pyi", "v1/error_details.binpb", "aio.py",
             "evaluate/tasks/bank.py", "evaluate/formats/prompts/longbench.json"):
    assert (target / "refocus" / name).is_file(), f"{name} is not in the package"
