# LibTorch as imported targets. find_package(Torch) is not used: with a CUDA build it demands nvcc and sets flags of its own.
if(NOT EXISTS ${REFOCUS_TORCH_ROOT}/include/ATen/ATen.h)
  message(FATAL_ERROR "REFOCUS_TORCH_ROOT=${REFOCUS_TORCH_ROOT} has no include/ATen/ATen.h: run ./setup, or point it at an "
                      "existing torch 2.11.0 (the folder with include/ and lib/)")
endif()
add_library(refocus::torch_cpu INTERFACE IMPORTED)
target_include_directories(refocus::torch_cpu SYSTEM INTERFACE ${REFOCUS_TORCH_ROOT}/include
                           ${REFOCUS_TORCH_ROOT}/include/torch/csrc/api/include)
target_compile_definitions(refocus::torch_cpu INTERFACE AT_PER_OPERATOR_HEADERS TORCH_ASSERT_ONLY_METHOD_OPERATORS)
# libtorch_cpu of a CUDA build needs libcudart and libcupti, found through its own RPATH at run time; at link time they may be
# absent.
target_link_libraries(refocus::torch_cpu INTERFACE ${REFOCUS_TORCH_ROOT}/lib/libtorch_cpu.so
                      ${REFOCUS_TORCH_ROOT}/lib/libc10.so)
target_link_options(refocus::torch_cpu INTERFACE LINKER:--allow-shlib-undefined)

# What the CUDA build adds. LibTorch's own CUDA libraries (cuBLAS, cuDNN, NCCL, ...) are found at run time: beside torch where it
# was installed with its dependencies, or in the toolkit. Nothing names a symbol of libtorch_cuda, which registers its operators
# when it is loaded: hence --no-as-needed.
if(REFOCUS_CUDA)
  find_package(CUDAToolkit 13.0 REQUIRED)
  foreach(name torch_cuda c10_cuda)
    if(NOT EXISTS ${REFOCUS_TORCH_ROOT}/lib/lib${name}.so)
      message(FATAL_ERROR "REFOCUS_CUDA: ${REFOCUS_TORCH_ROOT}/lib/lib${name}.so is missing; use a CUDA build of torch 2.11.0")
    endif()
  endforeach()
  add_library(refocus::torch_cuda INTERFACE IMPORTED)
  target_link_libraries(refocus::torch_cuda INTERFACE refocus::torch_cpu CUDA::cudart)
  target_link_options(refocus::torch_cuda INTERFACE "LINKER:--push-state,--no-as-needed,${REFOCUS_TORCH_ROOT}/lib/libtorch_cuda.so,${REFOCUS_TORCH_ROOT}/lib/libc10_cuda.so,--pop-state")

  # LibTorch loads libnccl.so.2 too: one process, one NCCL.
  find_path(nccl_include nccl.h PATHS ${CUDAToolkit_INCLUDE_DIRS} REQUIRED)
  find_library(nccl_library NAMES libnccl.so.2 nccl PATHS ${CUDAToolkit_LIBRARY_DIR} REQUIRED)
  add_library(refocus::nccl INTERFACE IMPORTED)
  target_include_directories(refocus::nccl SYSTEM INTERFACE ${nccl_include})
  target_link_libraries(refocus::nccl INTERFACE ${nccl_library})
endif()
