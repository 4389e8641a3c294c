// Weights for a model of which only the configuration is at hand: shapes of real models without their files. Every
// element follows from seed, tensor name and index alone, so that any rank, device and program gets the same values
// (bench/random_weights.py gives them to transformers).
//
// key = mix(fnv1a64(name) ^ mix(seed)); element i of a matrix, counted row by row, is
//   ((mix(key + i * 0x9e3779b97f4a7c15) >> 40) / 2^24 - 0.5) * 0.069282032
// in fp32, rounded to bf16: uniform with deviation 0.02; so are biases. mix is splitmix64's. Norms are 1.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <string_view>

namespace refocus {

uint64_t RandomKey(uint64_t seed, std::string_view tensor_name);

// Elements [first, first + count) of the matrix with that key.
void RandomValues(uint64_t key, int64_t first, int64_t count, c10::BFloat16* out);

}  // namespace refocus
