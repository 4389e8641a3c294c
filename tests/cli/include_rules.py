#!/usr/bin/env python3
"""Checks who may include what. Usage: include_rules.py REPOSITORY; prints every violation, exit code 1 if there is one.

The rules are those of docs/architecture.md: coordinator and worker never include each other; only worker/link sees
generated protobuf and gRPC, and nothing that it includes, directly or not, sees LibTorch; kernels know CUDA, the shard plan and sampling; MPI,
CUDA and NCCL headers appear in one place each; base needs neither LibTorch nor CUDA nor RPC.
"""
import pathlib
import re
import sys

FOLDERS = ("base", "cli", "coordinator", "kernels", "worker")
KERNELS_BASE = ("base/kv_int8.h", "base/sampling.h", "base/shard_plan.h")
SUFFIXES = (".h", ".cc", ".cu", ".cuh", ".inc")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)

TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
RPC = re.compile(r"^(grpc|grpcpp|google/protobuf)/|\.pb\.h$")
CUDA = re.compile(r"^(cuda|cublas|cuda_[a-z0-9_]+|cub/|cooperative_groups)[a-zA-Z0-9_./]*$|^ATen/cuda/|^c10/cuda/")
NCCL = re.compile(r"^nccl\.h$")
MPI = re.compile(r"^mpi\.h$")
WHOLE_TORCH = re.compile(r"^(torch/(torch|extension|all)\.h|ATen/ATen\.h)$")


def sources(root):
    """Path in the repository -> what it includes."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                found[path.relative_to(root).as_posix()] = INCLUDE.findall(path.read_text(encoding="utf-8"))
    return found


def closure(path, includes):
    """Every repository file that `path` includes, directly or not, with the includer it was found through."""
    seen, todo = {}, [path]
    while todo:
        at = todo.pop()
        for name in includes.get(at, []):
            if name in includes and name not in seen and name != path:
                seen[name] = at
                todo.append(name)
    return seen


def direct_violations(path, name):
    folder = path.split("/")[0]
    into = name.split("/")[0]
    is_link = path.startswith("worker/link")
    if folder == "coordinator" and into in ("worker", "cli", "kernels"):
        yield "the coordinator includes nothing of " + into
    if folder == "worker" and into in ("coordinator", "cli"):
        yield "the worker includes nothing of " + into
    if folder == "cli" and into in ("coordinator", "worker", "kernels"):
        yield "the command line includes nothing of " + into
    if folder == "base" and into in FOLDERS and into != "base":
        yield "base includes nothing of " + into
    if folder == "kernels" and into in FOLDERS and into != "kernels" and name not in KERNELS_BASE:
        yield "kernels include nothing of " + into + " but " + " and ".join(KERNELS_BASE)
    may_use_kernels = path.startswith("worker/backend_cuda") or (  # what it lays out is what kernels read
        path.startswith("worker/collective_nccl_peers") and name == "kernels/exchange.h")
    if into == "kernels" and folder != "kernels" and not may_use_kernels:
        yield "only worker/backend_cuda includes kernels, and worker/collective_nccl_peers their exchange.h"
    if TORCH.search(name) and (folder != "worker" or is_link):
        yield "only the worker, without its link, sees LibTorch"
    if WHOLE_TORCH.search(name):
        yield "all of LibTorch at once: include the operators' own headers"
    if RPC.search(name) and folder in ("base", "kernels"):
        yield folder + " knows no RPC"
    if RPC.search(name) and folder == "worker" and not is_link:
        yield "only worker/link sees protobuf and gRPC"
    may_use_cuda = folder == "kernels" or path.startswith(
        ("worker/backend_cuda", "worker/collective_nccl", "worker/device_cuda"))
    if CUDA.search(name) and not may_use_cuda:
        yield "CUDA headers belong into kernels and worker/{backend_cuda,collective_nccl,device_cuda}"
    if NCCL.search(name) and not path.startswith("worker/collective_nccl"):
        yield "nccl.h belongs into worker/collective_nccl"
    if MPI.search(name) and path not in ("worker/collective_mpi.cc", "worker/launch.cc"):
        yield "mpi.h belongs into worker/collective_mpi.cc and worker/launch.cc"


def violations(root):
    includes = sources(root)
    for path, names in includes.items():
        for name in names:
            for rule in direct_violations(path, name):
                yield f"{path} includes {name}: {rule}"
        indirect = closure(path, includes)
        for header, through in indirect.items():
            for name in includes[header]:
                if path.startswith("worker/link") and TORCH.search(name):
                    yield f"{path} reaches {name} through {header} (included by {through}): the link sees no LibTorch"
                if path.startswith("worker/") and not path.startswith("worker/link") and RPC.search(name):
                    yield f"{path} reaches {name} through {header}: only worker/link sees protobuf and gRPC"


def main():
    root = pathlib.Path(sys.argv[1])
    count = len(sources(root))
    if count < 10:
        sys.exit(f"include_rules: found {count} sources in {root}: wrong folder?")
    found = sorted(set(violations(root)))
    for line in found:
        print(line)
    print(f"include_rules: {count} files, {len(found)} violations")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
