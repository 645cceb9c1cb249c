// The attention kernels; included by kernels_impl.h inside the namespace of an instruction set.

template <class T>
TLIN_INLINE float dot(const float* q, const T* k, int64_t d) {
  VecF acc{};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) acc += load(q + i) * load(k + i);
  Vec4 rest{};
  for (; i + 4 <= d; i += 4) rest += load4(q + i) * load4(k + i);
  float tail = (rest[0] + rest[2]) + (rest[1] + rest[3]);
  for (; i < d; ++i) tail += q[i] * load1(k + i);
  return sum(acc) + tail;
}

// out[0..d) += sum over 4 rows of p[row] * v[row]: one load and store of out for four of v.
template <class T>
TLIN_INLINE void add_rows(const float* p, const T* v, int64_t ldv, int64_t rows, int64_t d,
                          float* out) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, v += 4 * ldv) {
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      VecF acc = load(out + i);
      for (int r = 0; r < 4; ++r) acc += splat(p[row + r]) * load(v + r * ldv + i);
      store(out + i, acc);
    }
    for (; i + 4 <= d; i += 4) {
      Vec4 acc = load_as<Vec4>(out + i);
      for (int r = 0; r < 4; ++r) acc += p[row + r] * load4(v + r * ldv + i);
      store(out + i, acc);
    }
    for (; i < d; ++i) {
      for (int r = 0; r < 4; ++r) out[i] += p[row + r] * load1(v + r * ldv + i);
    }
  }
  for (; row < rows; ++row, v += ldv) {
    for (int64_t i = 0; i < d; ++i) out[i] += p[row] * load1(v + i);
  }
}

// Turns scores into p = 2^(score - m) in place, n a multiple of kLanes; returns the new maximum,
// adds to the sum. Scores of -infinity fill up n and add 2^-125 of the largest, far below its
// rounding.
TLIN_INLINE float softmax_step(float* scores, int64_t n, float maximum, float* total) {
  VecF top = splat(maximum);
  for (int64_t i = 0; i < n; i += kLanes) top = max(load(scores + i), top);
  const float m = largest(top);
  VecF acc{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF p = exp2(load(scores + i) - splat(m));
    store(scores + i, p);
    acc += p;
  }
  *total += sum(acc);
  return m;
}

constexpr int64_t kBlock = 64;

// One query row against n <= kBlock keys where they lie; state and out as in TileArgs.
template <class T>
TLIN_INLINE void attend_row(const float* q, const T* k, int64_t ldk, const T* v, int64_t ldv,
                            int64_t n, int64_t d, float* state, float* out) {
  float scores[kBlock];
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < n; ++i) scores[i] = dot(q, k + i * ldk, d);
  for (int64_t i = n; i < padded; ++i) scores[i] = kMinusInfinity;
  float total = 0;
  const float before = state[0];
  state[0] = softmax_step(scores, padded, before, &total);
  if (state[0] != before && before != kMinusInfinity) {
    const float shrink = exp2(before - state[0]);
    state[1] *= shrink;
    for (int64_t i = 0; i < d; ++i) out[i] *= shrink;
  }
  state[1] += total;
  add_rows(scores, v, ldv, n, d, out);
}

template <class T>
void decode(const float* q, int64_t g, const T* k, const T* v, int64_t begin, int64_t end,
            int64_t d, float* out) {
  for (int64_t h = 0; h < g; ++h) {
    float* state = out + h * (d + 2);
    state[0] = kMinusInfinity;
    for (int64_t i = 1; i < d + 2; ++i) state[i] = 0;
  }
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    for (int64_t h = 0; h < g; ++h) {
      float* state = out + h * (d + 2);
      attend_row(q + h * d, k + first * d, d, v + first * d, d, n, d, state, state + 2);
    }
  }
}

// scores[r][0..n) = q[r] . kt[:, 0..n) for R rows, kVectors vectors of keys at a time.
constexpr int kTileRows = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 3;
constexpr int kVectors = kLanes == 16 ? 4 : 4;

template <int R>
TLIN_INLINE void score_rows(const float* q, int64_t ldq, const float* kt, int64_t d, int64_t n,
                            float* scores) {
  for (int64_t first = 0; first < n; first += kVectors * kLanes) {
    VecF acc[R][kVectors] = {};
    for (int64_t i = 0; i < d; ++i) {
      VecF keys[kVectors];
      for (int c = 0; c < kVectors; ++c) keys[c] = load(kt + i * kTileKeys + first + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const VecF x = splat(q[r * ldq + i]);
        for (int c = 0; c < kVectors; ++c) acc[r][c] += x * keys[c];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kVectors; ++c) {
        store(scores + r * kTileKeys + first + c * kLanes, acc[r][c]);
      }
    }
  }
}

// out[r][0..C vectors) += sum over n keys of p[r][key] * vt[key], vt's rows `ldv` apart.
template <class V, int R, int C>
TLIN_INLINE void value_rows(const float* p, const float* vt, int64_t ldv, int64_t n, float* out) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  V acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load_as<V>(out + r * kMaxHeadDim + c * kWidth);
  }
  for (int64_t key = 0; key < n; ++key) {
    V values[C];
    for (int c = 0; c < C; ++c) values[c] = load_as<V>(vt + key * ldv + c * kWidth);
    for (int r = 0; r < R; ++r) {
      const V x = V{} + p[r * kTileKeys + key];
      for (int c = 0; c < C; ++c) acc[r][c] += x * values[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * kMaxHeadDim + c * kWidth, acc[r][c]);
  }
}

// All ldv columns, C vectors at a time and the rest one by one.
template <class V, int R, int C>
TLIN_INLINE void value_columns(const float* p, const float* vt, int64_t ldv, int64_t n,
                               float* out) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  int64_t i = 0;
  for (; i + C * kWidth <= ldv; i += C * kWidth) value_rows<V, R, C>(p, vt + i, ldv, n, out + i);
  for (; i < ldv; i += kWidth) value_rows<V, R, 1>(p, vt + i, ldv, n, out + i);
}

// Values are padded to 8 floats. Where that is no whole number of vectors (d = 36: 40 floats),
// half vectors with fewer rows at a time waste nothing on padding.
template <int R>
TLIN_INLINE void add_values(const float* p, const float* vt, int64_t ldv, int64_t n, float* out) {
  if (ldv % kLanes == 0) {
    if (ldv % (4 * kLanes) == 0) return value_columns<VecF, R, 4>(p, vt, ldv, n, out);
    if (ldv % (3 * kLanes) == 0) return value_columns<VecF, R, 3>(p, vt, ldv, n, out);
    return value_columns<VecF, R, 2>(p, vt, ldv, n, out);
  }
  if constexpr (kLanes <= 8) return;  // cannot happen: 8 floats are whole vectors
  constexpr int kHalf = R % 2 == 0 ? R / 2 : R;
  for (int r = 0; r < R; r += kHalf) {
    value_columns<Vec8, kHalf, 5>(p + r * kTileKeys, vt, ldv, n, out + r * kMaxHeadDim);
  }
}

template <int R, class T>
TLIN_INLINE void tile_rows(const TileArgs<T>& a, int64_t row, int64_t first, int64_t n,
                           const float* kt, const float* vt, int64_t ldv) {
  alignas(64) float scores[R * kTileKeys];
  alignas(64) float out[R * kMaxHeadDim];
  constexpr int64_t kStep = kVectors * kLanes;
  int64_t visible = n;  // of the last row: the most any row of this group sees
  if (a.causal) {
    const int64_t last = a.diagonal + row + R - first;
    if (last <= 0) return;
    visible = last < n ? last : n;
  }
  const int64_t padded = (visible + kStep - 1) / kStep * kStep;
  score_rows<R>(a.q + row * a.ldq, a.ldq, kt, a.d, padded, scores);
  int64_t sees[R];
  for (int r = 0; r < R; ++r) {
    float* s = scores + r * kTileKeys;
    const int64_t limit = a.diagonal + row + r + 1 - first;
    sees[r] = a.causal && limit < visible ? (limit > 0 ? limit : 0) : visible;
    for (int64_t i = sees[r]; i < padded; ++i) s[i] = kMinusInfinity;
    float* state = a.state + (row + r) * a.ld_state;
    float total = 0;
    const float before = state[0];
    if (sees[r] > 0) state[0] = softmax_step(s, padded, before, &total);
    const float shrink = before == kMinusInfinity ? 0.0f : exp2(before - state[0]);
    state[1] = state[1] * shrink + total;
    const float* from = a.out + (row + r) * a.ldq;
    for (int64_t i = 0; i < a.d; ++i) out[r * kMaxHeadDim + i] = from[i] * shrink;
    for (int64_t i = a.d; i < ldv; ++i) out[r * kMaxHeadDim + i] = 0;
  }
  // All rows see what the first does. The rest one by one: no value may meet a row it is hidden
  // from, since even 0 times NaN is NaN.
  add_values<R>(scores, vt, ldv, sees[0], out);
  for (int r = 1; r < R; ++r) {
    add_values<1>(scores + r * kTileKeys + sees[0], vt + sees[0] * ldv, ldv, sees[r] - sees[0],
                  out + r * kMaxHeadDim);
  }
  for (int r = 0; r < R; ++r) {
    float* to = a.out + (row + r) * a.ldq;
    for (int64_t i = 0; i < a.d; ++i) to[i] = out[r * kMaxHeadDim + i];
  }
}

// Too few rows to pack keys for.
template <class T>
void few_rows(const TileArgs<T>& a) {
  for (int64_t first = a.begin; first < a.end; first += kBlock) {
    for (int64_t row = 0; row < a.rows; ++row) {
      int64_t n = a.end - first < kBlock ? a.end - first : kBlock;
      const int64_t limit = a.diagonal + row + 1 - first;
      if (a.causal && limit < n) n = limit;
      if (n <= 0) continue;
      attend_row(a.q + row * a.ldq, a.k + first * a.ldk, a.ldk, a.v + first * a.ldv, a.ldv, n, a.d,
                 a.state + row * a.ld_state, a.out + row * a.ldq);
    }
  }
}

template <class T>
void tile(const TileArgs<T>& a) {
  if (a.rows < kTileRows) return few_rows(a);
  const int64_t ldv = (a.d + 7) / 8 * 8;
  float* kt = a.scratch;             // (d, kTileKeys): keys transposed
  float* vt = kt + a.d * kTileKeys;  // (kTileKeys, ldv): values, rows padded with zeros
  for (int64_t first = a.begin; first < a.end; first += kTileKeys) {
    const int64_t n = a.end - first < kTileKeys ? a.end - first : kTileKeys;
    if (a.causal && first > a.diagonal + a.rows - 1) break;
    for (int64_t key = 0; key < n; ++key) {
      const T* k = a.k + (first + key) * a.ldk;
      const T* v = a.v + (first + key) * a.ldv;
      for (int64_t i = 0; i < a.d; ++i) kt[i * kTileKeys + key] = load1(k + i);
      for (int64_t i = 0; i < a.d; ++i) vt[key * ldv + i] = load1(v + i);
      for (int64_t i = a.d; i < ldv; ++i) vt[key * ldv + i] = 0;
    }
    for (int64_t i = 0; i < a.d && n < kTileKeys; ++i) {
      for (int64_t key = n; key < kTileKeys; ++key) kt[i * kTileKeys + key] = 0;
    }
    int64_t row = 0;
    for (; row + kTileRows <= a.rows; row += kTileRows) {
      tile_rows<kTileRows>(a, row, first, n, kt, vt, ldv);
    }
    for (; row < a.rows; ++row) tile_rows<1>(a, row, first, n, kt, vt, ldv);
  }
}
