// CPU kernels in the compiler's own four-lane vectors: any processor.
#include "worker/backend_cpu_kernels.h"

namespace refocus {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr const char* kName = "baseline";
  static constexpr int64_t kLanes = 4;
  static constexpr int kRegisters = 16;
  Float4 v;
};

inline Vec Set(float x) { return {Float4{x, x, x, x}}; }
inline Vec Load(const float* p) {
  Vec x;
  __builtin_memcpy(&x.v, p, sizeof(x.v));
  return x;
}
inline void Store(float* p, Vec x) { __builtin_memcpy(p, &x.v, sizeof(x.v)); }
inline Vec Select(Int4 mask, Vec yes, Vec no) { return {(Float4)(((Int4)yes.v & mask) | ((Int4)no.v & ~mask))}; }
inline Vec Add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec Sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec Mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec Max(Vec a, Vec b) { return Select(a.v > b.v, a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }     // a * b + c
inline Vec FmaSub(Vec a, Vec b, Vec c) { return {a.v * b.v - c.v}; }  // a * b - c
inline Vec NegFma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }  // c - a * b

// To nearest, for |a| < 2^22; beyond, the caller discards the result.
inline Vec Round(Vec a) {
  const Vec magic = Set(12582912.0f);  // 1.5 * 2^23
  return Sub(Add(a, magic), magic);
}

// a in [0.5, 2), so that adding n to the exponent's bits is exact for -126 < n < 127; beyond, the caller discards the
// result.
inline Vec TimesPow2(Vec a, Vec n) {
  // The low bits of n + 1.5 * 2^23 are n; the shift drops the rest.
  typedef uint32_t Uint4 __attribute__((vector_size(16)));
  const Uint4 shift = (Uint4)Add(n, Set(12582912.0f)).v << 23;
  return {(Float4)((Uint4)a.v + shift)};
}

inline Vec ZeroBelow(Vec x, float bound, Vec y) { return Select(x.v < Set(bound).v, Set(0), y); }
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) { return Select(a.v < b.v, yes, no); }
inline float Sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float MaxOf(Vec a) {
  float most = a.v[0];
  for (int i = 1; i < 4; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
inline void StoreSums(float* p, Vec a, Vec b, Vec c, Vec d) {
  p[0] = Sum(a);
  p[1] = Sum(b);
  p[2] = Sum(c);
  p[3] = Sum(d);
}

}  // namespace
}  // namespace refocus

#include "worker/backend_cpu_kernels.inc"

namespace refocus {

const CpuKernels& BaselineKernels() { return kTable; }

const CpuKernels& BestCpuKernels() {
  if (const CpuKernels* kernels = Avx512Kernels()) return *kernels;
  if (const CpuKernels* kernels = Avx2Kernels()) return *kernels;
  return BaselineKernels();
}

}  // namespace refocus
