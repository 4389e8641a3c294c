#!/usr/bin/env python3
"""Installs the Python package into a folder, as `pip install ./python` does, of a copy of the sources; fetches nothing.

Usage: python_package.py REPOSITORY TARGET, with the build's requirements on PYTHONPATH (./setup: .deps/python)
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile


def install(repository, target):
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # pip builds in the source's folder
        for name in ("python", "proto"):
            shutil.copytree(repository / name, pathlib.Path(folder) / name,
                            ignore=shutil.ignore_patterns("build", "*.egg-info", "*_pb2.py*", "*.binpb", "__pycache__"))
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
                        "--no-deps", "--no-build-isolation", "--root-user-action", "ignore", "--target", target,
                        pathlib.Path(folder) / "python"], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    install(*map(pathlib.Path, sys.argv[1:]))
