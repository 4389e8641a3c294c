# gRPC, protobuf and Abseil from the distribution's static archives, so that a binary runs where none of them is installed and
# so that nothing of theirs is exported next to LibTorch, which carries a protobuf of its own.
find_package(Threads REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(ZLIB REQUIRED)

set(lib /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE})
file(GLOB absl ${lib}/libabsl_*.a)
list(FILTER absl EXCLUDE REGEX "test|mock|scoped_set_env")
if(NOT absl)
  message(FATAL_ERROR "Abseil's static archives are missing from ${lib}: run ./setup")
endif()
foreach(name grpc++ grpc++_reflection grpc gpr address_sorting upb protobuf re2 cares)
  list(APPEND rpc ${lib}/lib${name}.a)
endforeach()
list(JOIN rpc "," rpc)
list(JOIN absl "," absl)

add_library(refocus_absl INTERFACE)
target_link_libraries(refocus_absl INTERFACE "$<LINK_GROUP:RESCAN,${absl}>" Threads::Threads)

add_library(refocus_rpc INTERFACE)
target_link_libraries(refocus_rpc INTERFACE "$<LINK_GROUP:RESCAN,${rpc},${absl}>" OpenSSL::SSL OpenSSL::Crypto
                                            ZLIB::ZLIB Threads::Threads)
target_link_options(refocus_rpc INTERFACE LINKER:--exclude-libs,ALL
                    LINKER:--version-script=${CMAKE_CURRENT_LIST_DIR}/hide.map)
find_program(PROTOC protoc REQUIRED)
find_program(GRPC_CPP_PLUGIN grpc_cpp_plugin REQUIRED)
