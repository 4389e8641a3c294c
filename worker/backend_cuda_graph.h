// A pass recorded as a CUDA graph. Included by the CUDA backend alone.
#pragma once

#include <ATen/cuda/CUDAGraph.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <utility>

#include "base/log.h"
#include "worker/backend.h"
#include "worker/collective.h"

namespace refocus {

// The first run is eager, so that libraries set up what they keep; the second is recorded, the others replay it.
class GraphRepeat : public Repeat {
 public:
  GraphRepeat(std::function<void()> pass, at::cuda::MempoolId_t pool) : pass_(std::move(pass)), pool_(pool) {}

  void Run() override {
    ++runs_;
    if (runs_ == 2) recorded_ = Record();
    recorded_ ? graph_.replay() : pass_();
  }

 private:
  bool Record() {
    graph_.capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
    std::string why;
    std::exception_ptr lost;
    try {
      pass_();
    } catch (const CollectiveError&) {
      lost = std::current_exception();
    } catch (const std::exception& error) {
      why = error.what();
    }
    try {  // a capture must be ended in any case
      graph_.capture_end();
    } catch (const std::exception& error) {
      if (why.empty()) why = error.what();
    }
    if (lost != nullptr) std::rethrow_exception(lost);
    if (why.empty()) return true;
    graph_.reset();
    cudaGetLastError();
    LogWarning("a pass could not be recorded as a CUDA graph and is launched piece by piece: " + why);
    return false;
  }

  std::function<void()> pass_;
  const at::cuda::MempoolId_t pool_;
  at::cuda::CUDAGraph graph_;
  int64_t runs_ = 0;
  bool recorded_ = false;
};

}  // namespace refocus
