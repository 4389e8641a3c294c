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
target_link_options(refocus::torch_cpu INTERFACE LINKER:--allow-shlib-undefined
                    LINKER:-rpath,${REFOCUS_TORCH_ROOT}/lib)
