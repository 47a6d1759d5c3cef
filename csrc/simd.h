#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Portable vector arithmetic. Row functions are plain loops that the compiler vectorises; MEGALITE_CLONES builds each
// once per instruction set and chooses at load time, so one wheel runs on any x86-64 machine and uses AVX-512 if
// available. Everything they call must be inlined into the clone, hence MEGALITE_INLINE.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MEGALITE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGALITE_CLONES
#endif
#define MEGALITE_INLINE inline __attribute__((always_inline))

namespace megalite {

// bfloat16 is handled as its bits, the upper half of a float.
using bf16 = uint16_t;

// The type of sums: promote(T, float).
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <class To, class From>
MEGALITE_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

MEGALITE_INLINE float widen(float x) { return x; }
MEGALITE_INLINE double widen(double x) { return x; }
MEGALITE_INLINE float widen(bf16 x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }

template <class T, class A>
MEGALITE_INLINE T narrow(A x) {
  return x;
}
// Round to nearest even; NaN is handled separately, because adding the rounding bias to its bits could change it.
template <>
MEGALITE_INLINE bf16 narrow<bf16, float>(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<bf16>(x == x ? rounded : 0x7fc0u);
}

// exp for x <= 0 to about one unit in the last place: 2^n · e^r with |r| <= ln2/2 and the Cephes polynomial, because
// libm's expf does not vectorise without -ffast-math. Results below the smallest normal float become 0.
MEGALITE_INLINE float exp_nonpositive(float x) {
  const float shifter = 12582912.0f;  // 1.5 · 2^23: adding it leaves the rounded integer in the low bits
  const float clamped = x < -87.33f ? -87.33f : x;
  const float shifted = clamped * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t scaled = bits_of<uint32_t>(p) + (bits_of<uint32_t>(shifted) << 23);
  const float result = x < -87.33f ? 0.0f : bits_of<float>(scaled);
  return x == x ? result : x;
}
// float64 serves parity tests, not speed.
MEGALITE_INLINE double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace megalite
