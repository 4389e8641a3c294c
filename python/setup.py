"""Generates the messages from the API's definition in proto/, which stands beside this folder, at every build."""
import pathlib

import grpc_tools
from grpc_tools import protoc
from setuptools import setup
from setuptools.command.build_py import build_py

PROTO = pathlib.Path(__file__).resolve().parent.parent / "proto"
API = ("refocus/v1/cluster.proto", "refocus/v1/context.proto", "refocus/v1/inference.proto")
ERRORS = "google/rpc/error_details.proto"


class BuildWithMessages(build_py):
    def run(self):
        super().run()
        target = pathlib.Path("src" if self.editable_mode else self.build_lib)
        well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
        common = ["protoc", f"-I{PROTO}", f"-I{well_known}"]
        # Errors as a descriptor: a module of that name would collide with googleapis' own where that is installed.
        errors = target / "refocus" / "v1" / "error_details.binpb"
        for arguments in ([f"--python_out={target}", f"--pyi_out={target}", *API],
                          ["--include_imports", f"--descriptor_set_out={errors}", ERRORS]):
            if protoc.main([*common, *arguments]) != 0:
                raise SystemExit(f"cannot generate messages from {PROTO}: build from a checkout of the repository")


setup(cmdclass={"build_py": BuildWithMessages})
