"""Every include rule must bite: each case plants one violation into a small tree."""
import os
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(__file__))
import include_rules  # noqa: E402


def found_in(files):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return list(include_rules.violations(root))


class IncludeRules(unittest.TestCase):
    def test_allowed(self):
        self.assertEqual([], found_in({
            "base/status.h": "#include <string>\n",
            "coordinator/main.cc": '#include <grpcpp/server.h>\n#include "base/status.h"\n',
            "worker/link.cc": '#include "worker/command.h"\n#include "refocus/internal/v1/group.grpc.pb.h"\n',
            "worker/command.h": '#include "base/status.h"\n',
            "worker/model.cc": '#include <ATen/ops/mm.h>\n#include "worker/command.h"\n',
            "worker/collective_mpi.cc": "#include <mpi.h>\n",
            "worker/backend_cuda.cc": '#include <cuda_runtime.h>\n#include "kernels/combine.h"\n',
            "worker/collective_nccl_peers.h": '#include "kernels/exchange.h"\n',
            "kernels/combine.h": "#include <cuda_runtime.h>\n",
            "kernels/exchange.h": "#include <cuda_runtime.h>\n",
            "cli/main.cc": '#include "refocus/v1/context.grpc.pb.h"\n',
        }))

    def test_each_rule_bites(self):
        cases = {
            "coordinator/a.cc": "worker/engine.h",
            "coordinator/b.cc": "ATen/core/Tensor.h",
            "worker/a.cc": "coordinator/tokenizer.h",
            "worker/b.cc": "google/protobuf/message.h",
            "worker/c.cc": "refocus/internal/v1/group.pb.h",
            "worker/d.cc": "cuda_runtime.h",
            "worker/e.cc": "nccl.h",
            "worker/f.cc": "mpi.h",
            "worker/g.cc": "ATen/ATen.h",
            "worker/h.cc": "torch/torch.h",
            "worker/i.cc": "kernels/combine.h",
            "worker/collective_nccl.cc": "kernels/exchange.h",
            "worker/collective_nccl_peers.cc": "kernels/combine.h",
            "worker/link.h": "c10/core/Device.h",
            "base/a.h": "torch/csrc/autograd.h",
            "base/b.h": "cuda.h",
            "base/c.h": "grpcpp/grpcpp.h",
            "base/d.h": "worker/engine.h",
            "kernels/a.cu": "ATen/core/Tensor.h",
            "kernels/b.cu": "base/status.h",
            "cli/a.cc": "worker/engine.h",
            "cli/b.cc": "c10/core/Device.h",
        }
        for path, header in cases.items():
            with self.subTest(path=path, header=header):
                self.assertTrue(found_in({path: f"#include <{header}>\n"}))

    def test_link_may_not_reach_torch_through_others(self):
        found = found_in({
            "worker/link.cc": '#include "worker/a.h"\n',
            "worker/a.h": '  #  include "worker/b.h"\n',
            "worker/b.h": "#include <ATen/core/Tensor.h>\n",
        })
        self.assertEqual(1, len(found))
        self.assertIn("worker/link.cc reaches ATen/core/Tensor.h through worker/b.h", found[0])

    def test_worker_may_not_reach_protobuf_through_the_link(self):
        found = found_in({
            "worker/engine.cc": '#include "worker/link.h"\n',
            "worker/link.h": '#include "refocus/internal/v1/group.pb.h"\n',
        })
        self.assertEqual(1, len(found))


if __name__ == "__main__":
    unittest.main()
