// Portable vectors through the compiler's vector extension, kLanes floats wide. Included inside
// the namespace of one instruction set (see kernels_impl.h), after kLanes is defined there, so
// that no instruction of a wider set leaks into code that runs without it.

#define TLIN_INLINE inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef uint32_t Vec4U __attribute__((vector_size(16)));
typedef uint16_t Vec4H __attribute__((vector_size(8)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
TLIN_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

TLIN_INLINE VecF splat(float x) { return VecF{} + x; }

template <class V>
TLIN_INLINE V load_as(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TLIN_INLINE VecF load(const float* p) { return load_as<VecF>(p); }
TLIN_INLINE VecF load(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bits<VecF>(__builtin_convertvector(h, VecU) << 16);
}
// Four floats: what remains of a row whose length is no multiple of kLanes.
TLIN_INLINE Vec4 load4(const float* p) { return load_as<Vec4>(p); }
TLIN_INLINE Vec4 load4(const bf16* p) {
  Vec4H h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bits<Vec4>(__builtin_convertvector(h, Vec4U) << 16);
}

template <class V>
TLIN_INLINE void store(float* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

TLIN_INLINE float load1(const float* p) { return *p; }
TLIN_INLINE float load1(const bf16* p) { return bits<float>(uint32_t{p->bits} << 16); }
TLIN_INLINE void store1(float* p, float x) { *p = x; }
TLIN_INLINE void store1(bf16* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = bits<uint32_t>(x);
  p->bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

TLIN_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
TLIN_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }

TLIN_INLINE float sum(VecF v) {
  Vec4 parts[kLanes / 4];
  __builtin_memcpy(parts, &v, sizeof(v));
  for (int i = 1; i < kLanes / 4; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}
TLIN_INLINE float largest(VecF v) {
  Vec4 parts[kLanes / 4];
  __builtin_memcpy(parts, &v, sizeof(v));
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = parts[i] > parts[0] ? parts[i] : parts[0];
  const float a = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1];
  const float b = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
  return a > b ? a : b;
}

// 2^x to about 2 ulp for x < 128; below -125 it stays at 2^-125, NaN stays NaN.
TLIN_INLINE VecF exp2(VecF x) {
  const VecF lowest = splat(-125.0f);
  const VecF clamped = lowest > x ? lowest : x;       // in this order NaN passes
  const VecF shifted = clamped + splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const VecF r = clamped - (shifted - splat(12582912.0f));
  VecF p = splat(1.5403530e-4f);  // Taylor's series of 2^r: |r| <= 1/2 leaves 1e-7
  p = p * r + splat(1.3333558e-3f);
  p = p * r + splat(9.6181291e-3f);
  p = p * r + splat(5.5504109e-2f);
  p = p * r + splat(2.4022651e-1f);
  p = p * r + splat(6.9314718e-1f);
  p = p * r + splat(1.0f);
  // The integer is in the low bits of `shifted`; added to the exponent of p.
  return bits<VecF>(bits<VecI>(p) + (bits<VecI>(shifted) << 23));
}
TLIN_INLINE float exp2(float x) { return exp2(splat(x))[0]; }
