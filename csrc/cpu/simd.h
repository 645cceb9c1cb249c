// Portable vectors through the compiler's vector extension, kLanes floats wide. Included inside
// the namespace of one instruction set (see kernels_impl.h), after kLanes is defined there, so
// that no instruction of a wider set leaks into code that runs without it.

#define TLIN_INLINE inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
TLIN_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

TLIN_INLINE VecF splat(float x) { return VecF{} + x; }

TLIN_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TLIN_INLINE VecF load(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bits<VecF>(__builtin_convertvector(h, VecU) << 16);
}
TLIN_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }

TLIN_INLINE float load1(const float* p) { return *p; }
TLIN_INLINE float load1(const bf16* p) { return bits<float>(uint32_t{p->bits} << 16); }
TLIN_INLINE void store1(float* p, float x) { *p = x; }
TLIN_INLINE void store1(bf16* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = bits<uint32_t>(x);
  p->bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

TLIN_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
TLIN_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }

typedef float Vec4 __attribute__((vector_size(16)));
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

// e^x to about 2 ulp on [-87, 88]; clamped outside, NaN stays NaN.
TLIN_INLINE VecF exp(VecF x) {
  const VecF clamped = max(min(x, splat(88.0f)), splat(-87.0f));
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF n = (clamped * splat(1.44269504f) + magic) - magic;
  const VecF r = clamped - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  VecF p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
  const VecF result = p * bits<VecF>(exponent);
  return x == x ? result : x;
}
TLIN_INLINE float exp1(float x) { return exp(splat(x))[0]; }
