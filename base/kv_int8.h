// K and V in eight bits: a token's head_dim numbers of one K/V head become sign-and-magnitude codes (bit 7 the sign,
// bits 0 to 6 the magnitude) with one bf16 scale, about the largest magnitude / 127. A code stands for code * scale
// rounded to bf16, on every device alike: the product takes 15 bits, which fp32 holds exactly, and what tensor cores
// read is bf16.
#pragma once

#include <bit>
#include <cstdint>

namespace refocus {

inline constexpr int kInt8Largest = 127;
inline constexpr uint16_t kInt8ScaleNaN = 0x7fc0;

constexpr uint16_t Bf16Bits(float x) {  // to nearest even; not for NaN
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
constexpr float FromBf16Bits(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// The scale's bits, for a vector whose largest magnitude has these bits as a float: the maximum over bits &
// 0x7fffffff, in which infinities and NaN come out on top. They make the whole vector NaN, as do numbers from 2^120
// on; what is below 2^-100 becomes 0.
constexpr uint16_t Int8Scale(uint32_t magnitude_bits) {
  if (magnitude_bits >= uint32_t{247} << 23) return kInt8ScaleNaN;
  if (magnitude_bits < uint32_t{27} << 23) return 0;
  return Bf16Bits(std::bit_cast<float>(magnitude_bits) * (1.0f / kInt8Largest));
}

// What a number is multiplied with before it is rounded to a whole one and cut to 127.
constexpr float Int8Inverse(uint16_t scale) { return scale == 0 ? 0.0f : 1.0f / FromBf16Bits(scale); }

}  // namespace refocus
