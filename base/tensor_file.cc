#include "base/tensor_file.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"
#include "base/input_file.h"

namespace refocus {
namespace {

constexpr int64_t kBlock = 32;                      // values a quantised block
constexpr int64_t kQ8_0Bytes = 2 + kBlock;          // f16 scale, 32 x i8
constexpr int64_t kQ4_0Bytes = 2 + kBlock / 2;      // f16 scale, 32 x u4
constexpr int64_t kQ4_1Bytes = 2 + 2 + kBlock / 2;  // f16 scale, f16 minimum, 32 x u4
constexpr int64_t kSuper = 256;                     // values of a block of blocks
constexpr int64_t kScaleBytes = 12;                 // of Q4_K: 8 scales and 8 minima of 6 bits each
constexpr int64_t kQ4_KBytes = 2 + 2 + kScaleBytes + kSuper / 2;            // f16 scale, f16 of minima, scales, u4
constexpr int64_t kQ6_KBytes = kSuper / 2 + kSuper / 4 + kSuper / 16 + 2;  // low 4 bits, high 2, i8 scales, f16 scale

// All bodies below are plain loops that the compiler vectorises; they are instantiated twice, for the baseline and for
// AVX2.
#define REFOCUS_INLINE inline __attribute__((always_inline))

REFOCUS_INLINE float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

REFOCUS_INLINE uint16_t LoadU16(const uint8_t* in) { return static_cast<uint16_t>(in[0] | in[1] << 8); }

// No branch and no denormal operand, so that flush-to-zero modes cannot change a weight.
REFOCUS_INLINE float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t wide = magnitude << 13;
  const float tiny = FromBits(0x3f000000u + magnitude) - 0.5f;  // 0.5 + magnitude * 2^-24, exact
  uint32_t tiny_bits;
  std::memcpy(&tiny_bits, &tiny, sizeof(tiny_bits));
  uint32_t bits = wide + (112u << 23);
  bits = magnitude >= 0x7c00u ? (wide | 0x7f800000u) : bits;
  bits = magnitude < 0x0400u ? tiny_bits : bits;
  return FromBits(bits | sign);
}

REFOCUS_INLINE void DecodeF16(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t i = 0; i < elements; ++i) {
    uint16_t half;
    std::memcpy(&half, in + 2 * i, sizeof(half));
    out[i] = HalfToFloat(half);
  }
}

REFOCUS_INLINE void DecodeBf16(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t i = 0; i < elements; ++i) {
    uint16_t half;
    std::memcpy(&half, in + 2 * i, sizeof(half));
    out[i] = FromBits(static_cast<uint32_t>(half) << 16);
  }
}

REFOCUS_INLINE void DecodeQ8_0(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t block = 0; block < elements / kBlock; ++block, in += kQ8_0Bytes, out += kBlock) {
    const float scale = HalfToFloat(LoadU16(in));
    for (int64_t i = 0; i < kBlock; ++i) out[i] = static_cast<float>(static_cast<int8_t>(in[2 + i])) * scale;
  }
}

// Blocks of 16 bytes, the second half of the values in their high bits. A loop so short would be unrolled before it could
// be vectorised.
template <int kLeast>
REFOCUS_INLINE void DecodeNibbles(const uint8_t* in, float scale, float least, float* out) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < kBlock / 2; ++i) {
    const float low = static_cast<float>((in[i] & 0x0f) - kLeast) * scale;
    const float high = static_cast<float>((in[i] >> 4) - kLeast) * scale;
    out[i] = kLeast == 0 ? low + least : low;
    out[i + kBlock / 2] = kLeast == 0 ? high + least : high;
  }
}

REFOCUS_INLINE void DecodeQ4_0(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t block = 0; block < elements / kBlock; ++block, in += kQ4_0Bytes, out += kBlock) {
    DecodeNibbles<8>(in + 2, HalfToFloat(LoadU16(in)), 0.0f, out);
  }
}

REFOCUS_INLINE void DecodeQ4_1(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t block = 0; block < elements / kBlock; ++block, in += kQ4_1Bytes, out += kBlock) {
    DecodeNibbles<0>(in + 4, HalfToFloat(LoadU16(in)), HalfToFloat(LoadU16(in + 2)), out);
  }
}

// Scales of the 8 blocks: 6 bits in bytes 0 to 3 (their minima: 4 to 7), later ones with the low 4 bits in bytes 8 to 11
// and the high 2 in the top of bytes 0 to 7.
REFOCUS_INLINE void DecodeQ4_K(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t super = 0; super < elements / kSuper; ++super, in += kQ4_KBytes) {
    const float scale = HalfToFloat(LoadU16(in));
    const float least = HalfToFloat(LoadU16(in + 2));
    const uint8_t* packed = in + 4;
    const uint8_t* low = packed + kScaleBytes;
    float scales[8], minima[8];
    for (int64_t i = 0; i < 4; ++i) {
      scales[i] = scale * static_cast<float>(packed[i] & 0x3f);
      minima[i] = least * static_cast<float>(packed[4 + i] & 0x3f);
      scales[4 + i] = scale * static_cast<float>((packed[8 + i] & 0x0f) | ((packed[i] >> 2) & 0x30));
      minima[4 + i] = least * static_cast<float>((packed[8 + i] >> 4) | ((packed[4 + i] >> 2) & 0x30));
    }
    for (int64_t pair = 0; pair < 4; ++pair, low += kBlock, out += 2 * kBlock) {
      const float scale0 = scales[2 * pair], scale1 = scales[2 * pair + 1];
      const float least0 = minima[2 * pair], least1 = minima[2 * pair + 1];
      for (int64_t i = 0; i < kBlock; ++i) {
        out[i] = scale0 * static_cast<float>(low[i] & 0x0f) - least0;
        out[i + kBlock] = scale1 * static_cast<float>(low[i] >> 4) - least1;
      }
    }
  }
}

// Halves of 128 values: bytes of `low` hold a value of the first and of the second 64, bytes of `high` one of each 32.
REFOCUS_INLINE void DecodeQ6_K(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t super = 0; super < elements / kSuper; ++super, in += kQ6_KBytes) {
    const uint8_t* low = in;
    const uint8_t* high = low + kSuper / 2;
    const auto* packed = reinterpret_cast<const int8_t*>(high + kSuper / 4);
    const float scale = HalfToFloat(LoadU16(in + kQ6_KBytes - 2));
    for (int64_t half = 0; half < 2; ++half, low += 64, high += 32, packed += 8, out += 128) {
      float scales[8];
      for (int64_t i = 0; i < 8; ++i) scales[i] = scale * static_cast<float>(packed[i]);
      uint8_t values[128];
      for (int64_t i = 0; i < 32; ++i) {
        const uint8_t h = high[i], a = low[i], b = low[i + 32];
        values[i] = static_cast<uint8_t>((a & 0x0f) | (h & 3) << 4);
        values[i + 32] = static_cast<uint8_t>((b & 0x0f) | (h >> 2 & 3) << 4);
        values[i + 64] = static_cast<uint8_t>(a >> 4 | (h >> 4 & 3) << 4);
        values[i + 96] = static_cast<uint8_t>(b >> 4 | (h >> 6) << 4);
      }
      for (int64_t part = 0; part < 4; ++part) {
        const float first = scales[2 * part], second = scales[2 * part + 1];  // of 16 values each
        for (int64_t i = 0; i < 32; ++i) {
          out[32 * part + i] = (i < 16 ? first : second) * static_cast<float>(values[32 * part + i] - 32);
        }
      }
    }
  }
}

REFOCUS_INLINE void Decode(TensorType type, const uint8_t* in, int64_t elements, float* out) {
  switch (type) {
    case TensorType::kF32: std::memcpy(out, in, static_cast<size_t>(elements) * sizeof(float)); return;
    case TensorType::kF16: DecodeF16(in, elements, out); return;
    case TensorType::kBf16: DecodeBf16(in, elements, out); return;
    case TensorType::kQ8_0: DecodeQ8_0(in, elements, out); return;
    case TensorType::kQ4_0: DecodeQ4_0(in, elements, out); return;
    case TensorType::kQ4_1: DecodeQ4_1(in, elements, out); return;
    case TensorType::kQ4_K: DecodeQ4_K(in, elements, out); return;
    case TensorType::kQ6_K: DecodeQ6_K(in, elements, out); return;
  }
}

#if defined(__x86_64__)
// The instruction knows denormals in every mode.
__attribute__((target("avx2,f16c"))) void DecodeF16InHardware(const uint8_t* in, int64_t elements, float* out) {
  int64_t i = 0;
  for (; i + 8 <= elements; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * i))));
  }
  DecodeF16(in + 2 * i, elements - i, out + i);
}

__attribute__((target("avx2"))) void DecodeAvx2(TensorType type, const uint8_t* in, int64_t elements, float* out) {
  Decode(type, in, elements, out);
}
#endif

void DecodeBaseline(TensorType type, const uint8_t* in, int64_t elements, float* out) {
  Decode(type, in, elements, out);
}

struct Block {
  int64_t elements;
  int64_t bytes;
};

Block BlockOf(TensorType type) {
  switch (type) {
    case TensorType::kF32: return {1, 4};
    case TensorType::kF16: return {1, 2};
    case TensorType::kBf16: return {1, 2};
    case TensorType::kQ8_0: return {kBlock, kQ8_0Bytes};
    case TensorType::kQ4_0: return {kBlock, kQ4_0Bytes};
    case TensorType::kQ4_1: return {kBlock, kQ4_1Bytes};
    case TensorType::kQ4_K: return {kSuper, kQ4_KBytes};
    case TensorType::kQ6_K: return {kSuper, kQ6_KBytes};
  }
  return {1, 4};
}

}  // namespace

std::string TensorTypeName(TensorType type) {
  switch (type) {
    case TensorType::kF32: return "F32";
    case TensorType::kF16: return "F16";
    case TensorType::kBf16: return "BF16";
    case TensorType::kQ8_0: return "Q8_0";
    case TensorType::kQ4_0: return "Q4_0";
    case TensorType::kQ4_1: return "Q4_1";
    case TensorType::kQ4_K: return "Q4_K";
    case TensorType::kQ6_K: return "Q6_K";
  }
  return "?";
}

int64_t BlockElements(TensorType type) { return BlockOf(type).elements; }

int64_t TensorInfo::elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) REFOCUS_CHECK(!__builtin_mul_overflow(count, size, &count));
  return count;
}

StatusOr<int64_t> TensorBytes(TensorType type, int64_t elements) {
  const Block block = BlockOf(type);
  int64_t bytes = 0;
  if (elements < 0 || elements % block.elements != 0 ||
      __builtin_mul_overflow(elements / block.elements, block.bytes, &bytes)) {
    return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID",
                 "elements: got " + std::to_string(elements) + " of type " + TensorTypeName(type) +
                     ", allowed a multiple of " + std::to_string(block.elements) + " below 2^63 bytes",
                 {{"elements", std::to_string(elements)}, {"type", TensorTypeName(type)}});
  }
  return bytes;
}

Status ReadTensorBytes(const TensorInfo& info, void* out) {
  REFOCUS_ASSIGN_OR_RETURN(const InputFile file, InputFile::Open(info.file, "WEIGHTS_INVALID"));
  return file.ReadAt(info.offset, out, info.bytes);
}

void DecodeToFloat(TensorType type, const void* in, int64_t elements, float* out) {
  const auto* bytes = static_cast<const uint8_t*>(in);
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  static const bool has_f16c = has_avx2 && __builtin_cpu_supports("f16c");
  if (has_f16c && type == TensorType::kF16) return DecodeF16InHardware(bytes, elements, out);
  if (has_avx2) return DecodeAvx2(type, bytes, elements, out);
#endif
  DecodeBaseline(type, bytes, elements, out);
}

}  // namespace refocus
