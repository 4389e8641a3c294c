// CPU kernels for AVX-512F. Compiled with flags of its own; nothing here runs before Avx512Kernels() has asked the
// processor.
#include "worker/backend_cpu_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace refocus {
namespace {

struct Vec {
  static constexpr const char* kName = "avx512";
  static constexpr int64_t kLanes = 16;
  static constexpr int kRegisters = 32;
  __m512 v;
};

inline Vec Set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void Store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline Vec Add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }      // a * b + c
inline Vec FmaSub(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }   // a * b - c
inline Vec NegFma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline Vec Round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec TimesPow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Vec ZeroBelow(Vec x, float bound, Vec y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_NLT_UQ), y.v)};
}
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline float Sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float MaxOf(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline void StoreSums(float* p, Vec a, Vec b, Vec c, Vec d) {
  // Each step adds halves of two vectors into one: ab = a0 + a2, b0 + b2, a1 + a3, .. per 128 bits.
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

}  // namespace
}  // namespace refocus

#include "worker/backend_cpu_kernels.inc"

namespace refocus {

const CpuKernels* Avx512Kernels() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  return runs ? &kTable : nullptr;
}

}  // namespace refocus
#else
namespace refocus {
const CpuKernels* Avx512Kernels() { return nullptr; }
}  // namespace refocus
#endif
