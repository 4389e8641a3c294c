# `cmake --install`: a folder that runs wherever it is put. LibTorch, CUDA, NCCL and Open MPI are not in it:
# bin/refocus-worker finds them, sets the loader's path and starts libexec/refocus-worker.

# LibTorch's C++ interface changes with every version: the launcher accepts the one that the build saw.
file(STRINGS ${REFOCUS_TORCH_ROOT}/include/torch/headeronly/version.h version_lines REGEX "^#define TORCH_VERSION_[MP]")
string(REGEX REPLACE ".*_MAJOR ([0-9]+).*_MINOR ([0-9]+).*_PATCH ([0-9]+).*" "\\1.\\2.\\3" REFOCUS_TORCH_VERSION
       "${version_lines}")
if(REFOCUS_CUDA)
  set(REFOCUS_WITH_CUDA ON)
else()
  set(REFOCUS_WITH_CUDA OFF)
endif()
configure_file(${CMAKE_SOURCE_DIR}/deploy/refocus-worker.sh.in ${CMAKE_BINARY_DIR}/bundle/refocus-worker @ONLY)

# The build's RPATHs are taken out: no install RPATH is set.
install(TARGETS refocus refocus-coordinator RUNTIME DESTINATION bin)
install(TARGETS refocus-worker RUNTIME DESTINATION libexec)
install(PROGRAMS ${CMAKE_BINARY_DIR}/bundle/refocus-worker DESTINATION bin)
install(FILES ${CMAKE_SOURCE_DIR}/deploy/bundle-readme.txt DESTINATION . RENAME README.txt)
set(stripped bin/refocus bin/refocus-coordinator libexec/refocus-worker)
install(CODE "
  foreach(name ${stripped})
    execute_process(COMMAND \"${CMAKE_STRIP}\" \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/\${name}\"
                    COMMAND_ERROR_IS_FATAL ANY)
  endforeach()")

# What is linked in as archives or headers, with its licence as the distribution states it.
foreach(package libgrpc-dev libprotobuf-dev libabsl-dev libre2-dev libc-ares-dev libupb-dev libpcre2-dev libutf8proc-dev
                libxxhash-dev nlohmann-json3-dev libcli11-dev)
  install(FILES /usr/share/doc/${package}/copyright DESTINATION licenses RENAME ${package}.txt OPTIONAL)
endforeach()
