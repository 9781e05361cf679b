/* Softmax attention of every query on the keys with its m highest scores, on a CPU in float32 (FASA, mixers/fasa.py).

     S_ij = a_i . b_j     o_i = sum of w_ij v_j / sum of w_ij, both over the m keys j with the largest S_ij
     w_ij = 2^(q_i . k_j): q comes multiplied by the scale and by log2(e)

   a (H, T, C) and b (H, S / PANEL, C, PANEL), S = T filled up to whole panels with zeros; q, k (H, T, K); v, o (H, T, V);
   K and V are multiples of W. A query's scores stay in the cache until its keys are chosen; then the keys of many
   queries are read part by part, each part from the cache, by an online softmax (Milakov and Gimelshein 2018,
   https://arxiv.org/abs/1805.02867). Every query is worked on by one thread and the parts are always the same, so that
   the bits do not depend on the number of threads. */

#include "vectors.h"

#include <math.h>
#include <omp.h>

#define ROWS 6        /* queries whose scores are made at once: with two vectors of keys, twelve sums in registers */
#define PANEL (2 * W) /* keys of such a product */
#define TASK 48       /* queries of a task, which read the same part of keys and values; a multiple of ROWS */
#define PART 65536    /* numbers of such a part: 256 KB */
#define SUMS 8        /* vectors of an output that are summed at once */
#define AHEAD 8       /* keys that are asked for before they are needed */

int64_t panel(void) { return PANEL; }
/* Numbers that a thread needs for itself: scores, weights, places, and candidates with their scores. */
int64_t work_size(int64_t stride, int64_t m) { return ROWS * stride + (m + W) + (TASK * m + 16) + 2 * stride; }

/* scores (ROWS, stride) of the first n columns, n a multiple of PANEL. */
static void score(const float *const *a, const float *b, float *scores, int64_t channels, int64_t stride, int64_t n) {
  for (int64_t j = 0; j < n; j += PANEL) {
    vf sum[ROWS][2] = {};
    for (int64_t c = 0; c < channels; c++) {
      const vf left = load(b + (j * channels + c * PANEL)), right = load(b + (j * channels + c * PANEL) + W);
      for (int r = 0; r < ROWS; r++) sum[r][0] += a[r][c] * left, sum[r][1] += a[r][c] * right;
    }
    for (int r = 0; r < ROWS; r++)
      store(scores + r * stride + j, sum[r][0]), store(scores + r * stride + j + W, sum[r][1]);
  }
}

/* How many of s (n, a multiple of PANEL) are not below t. NaN is not. */
static int64_t reaching(const float *s, int64_t n, float t) {
  vi below[2] = {};
  for (int64_t j = 0; j < n; j += PANEL) below[0] += load(s + j) < splat(t), below[1] += load(s + j + W) < splat(t);
  int32_t lane[W];
  int64_t count = n;
  below[0] += below[1];
  memcpy(lane, below, sizeof lane);
  for (int i = 0; i < W; i++) count += lane[i];
  return count;
}

#if defined(__AVX__)
typedef float eight_floats __attribute__((vector_size(32)));
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__AVX2__)
typedef int32_t eight_ints __attribute__((vector_size(32)));
static int32_t front[256][8]; /* of eight lanes, those that are set, first */

__attribute__((constructor)) static void fill_front(void) {
  for (int set = 0; set < 256; set++)
    for (int lane = 0, to = 0; lane < 8; lane++)
      if (set >> lane & 1) front[set][to++] = lane;
}
#endif

/* Places of all scores s (n, a multiple of PANEL) that are not below t, in their order, and the scores. Place j is
   called names[j], or j where there are no names. Returns how many; writes up to 15 more, never more than n. */
static int64_t not_below(const float *s, const int32_t *names, int64_t n, float t, int32_t *places, float *values) {
  int64_t found = 0;
#if defined(__AVX512F__)
  const __m512 bound = _mm512_set1_ps(t);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 x = _mm512_loadu_ps(s + j);
    const __mmask16 set = _mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ);
    if (names) at = _mm512_loadu_si512(names + j);
    _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(set, at));
    if (values) _mm512_storeu_ps(values + found, _mm512_maskz_compress_ps(set, x));
    if (!names) at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    found += __builtin_popcount(set);
  }
#elif defined(__AVX2__)
  const eight_floats bound = t - (eight_floats){};
  eight_ints at = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t j = 0; j < n; j += 8, at += 8) {
    eight_floats x;
    eight_ints order;
    memcpy(&x, s + j, sizeof x);
    if (names) memcpy(&at, names + j, sizeof at);
    const int set = __builtin_ia32_movmskps256((eight_floats)~(x < bound));
    memcpy(&order, front[set], sizeof order);
    const eight_ints moved = (eight_ints)__builtin_ia32_permvarsi256(at, order);
    memcpy(places + found, &moved, sizeof moved);
    if (values) {
      x = __builtin_ia32_permvarsf256(x, order);
      memcpy(values + found, &x, sizeof x);
    }
    found += __builtin_popcount((unsigned)set);
  }
#else
  for (int64_t j = 0; j < n; j++) {
    places[found] = names ? names[j] : (int32_t)j;
    if (values) values[found] = s[j];
    found += !(s[j] < t);
  }
#endif
  return found;
}

/* Mean and standard deviation of every fourth vector. */
static void estimate(const float *s, int64_t seen, float *mean, float *deviation) {
  vf sum = {}, squares = {};
  int64_t vectors = 0;
  for (int64_t j = 0; j + W <= seen; j += 4 * W, vectors++) {
    const vf x = load(s + j);
    sum += x, squares += x * x;
  }
  const float count = (float)(vectors * W);
  *mean = vectors ? across(sum) / count : 0;
  const float variance = vectors ? across(squares) / count - *mean * *mean : 0;
  *deviation = variance > 0 ? sqrtf(variance) : 0;
}

/* The m largest of s (n, a multiple of PANEL), of which `seen` count and the others are -inf: their places in their
   order, among equals the first ones; NaN is the largest. Names and room as above. The threshold is found by counting
   and interpolating. */
static void largest_of(const float *s, const int32_t *names, int64_t seen, int64_t n, int64_t m, int32_t *places) {
  float low = s[0], high = s[0];
  int64_t whole = 0;
  vf lows = splat(low), highs = splat(high);
  for (; whole + W <= seen; whole += W) {
    const vf x = load(s + whole);
    lows = choose(x < lows, x, lows), highs = choose(x > highs, x, highs);
  }
  for (int i = 0; i < W; i++) low = lows[i] < low ? lows[i] : low, high = highs[i] > high ? highs[i] : high;
  for (int64_t j = whole; j < seen; j++) low = s[j] < low ? s[j] : low, high = s[j] > high ? s[j] : high;
  high = nextafterf(high, INFINITY);
  int64_t above_low = seen, above_high = reaching(s, n, high); /* above_low >= m; above_high < m, unless NaN is there */
  for (int64_t step = 1; above_low != m; step++) {
    const float part = ((float)(above_low - m) + 0.5f) / (float)(above_low - above_high);
    float t = low + (high - low) * (step % 4 ? part : 0.5f);
    if (!(t > low && t < high)) t = low + (high - low) / 2;
    if (!(t > low && t < high)) break; /* neighbouring numbers: low itself is there more than once */
    const int64_t above = reaching(s, n, t);
    if (above >= m) low = t, above_low = above; else high = t, above_high = above;
  }
  if (above_low == m && low > -INFINITY) {
    not_below(s, names, n, low, places, NULL);
    return;
  }
  int64_t found = 0, equals = above_low == m ? m : m - above_high;
  for (int64_t j = 0; j < seen && found < m; j++)
    if (!(s[j] < high) || (!(s[j] < low) && equals-- > 0)) places[found++] = names ? names[j] : (int32_t)j;
}

/* The same for many scores: first all that reach a bound a little below the last query's, `guess` in standard
   deviations above the mean, then the m largest of these. `some` and `values` have n numbers. */
static void select_largest(const float *s, int64_t seen, int64_t n, int64_t m, float *guess, int32_t *places,
                           int32_t *some, float *values) {
  float mean, deviation;
  int64_t found = 0;
  estimate(s, seen, &mean, &deviation);
  for (int turn = 0; turn < 4 && found < m; turn++) {
    found = not_below(s, NULL, n, mean + *guess * deviation, some, values);
    if (found < m) *guess -= 0.25f;
  }
  if (found < m) { /* no bell: all of them */
    largest_of(s, NULL, seen, n, m, places);
    return;
  }
  const int64_t filled = (found + PANEL - 1) / PANEL * PANEL;
  for (int64_t j = found; j < filled; j++) values[j] = -INFINITY;
  largest_of(values, some, found, filled, m, places);
  *guess += found > m + m / 4 ? 0.05f : found < m + m / 8 ? -0.05f : 0;
}

/* Sums of the lanes of four vectors. */
static inline void across_four(const vf *s, float *sums) {
#if defined(__AVX__)
  eight_floats half[4];
  for (int r = 0; r < 4; r++) {
    memcpy(half + r, s + r, sizeof half[r]);
#if W == 16
    eight_floats other;
    memcpy(&other, (const char *)(s + r) + sizeof other, sizeof other);
    half[r] += other;
#endif
  }
  const eight_floats pairs =
      __builtin_ia32_haddps256(__builtin_ia32_haddps256(half[0], half[1]), __builtin_ia32_haddps256(half[2], half[3]));
  for (int r = 0; r < 4; r++) sums[r] = pairs[r] + pairs[r + 4];
#else
  for (int r = 0; r < 4; r++) sums[r] = across(s[r]);
#endif
}

/* weights[i] = q . k of m keys, `wide` vectors each. */
static inline __attribute__((always_inline)) void dot_keys(const float *q, const float *k, const int32_t *places, int64_t m,
                                                           float *weights, const int64_t wide) {
  for (int64_t i = 0; i < m; i += 4) {
    const float *at[4];
    for (int r = 0; r < 4; r++) {
      at[r] = k + places[least(i + r, m - 1)] * wide * W;
      __builtin_prefetch(k + places[least(i + r + AHEAD, m - 1)] * wide * W);
    }
    vf first = {}, second = {}, third = {}, fourth = {}; /* an array would stay in memory */
    for (int64_t d = 0; d < wide; d++) {
      const vf x = load(q + d * W);
      first += x * load(at[0] + d * W), second += x * load(at[1] + d * W);
      third += x * load(at[2] + d * W), fourth += x * load(at[3] + d * W);
    }
    const vf sum[4] = {first, second, third, fourth};
    across_four(sum, weights + i);
  }
}

/* o, `wide` vectors, becomes o shrink + the weighted sum of the values of m keys. */
static inline __attribute__((always_inline)) void add_values(const float *v, const int32_t *places, const float *weights,
                                                             int64_t m, int64_t stride, float shrink, float *o,
                                                             const int64_t wide) {
  vf sum[SUMS] = {};
  for (int64_t i = 0; i < m; i++) {
    const float *row = v + places[i] * stride;
    for (int64_t r = 0; r < wide; r++) sum[r] += weights[i] * load(row + r * W);
  }
  for (int64_t r = 0; r < wide; r++) store(o + r * W, load(o + r * W) * shrink + sum[r]);
}

/* Adds m more keys to the output o (V,) of one query: o and *total are sums under the weights 2^(logit - *most).
   `weights` has room for W more than m. */
static void attend(const float *q, const float *k, const float *v, const int32_t *places, int64_t m, int64_t key_width,
                   int64_t value_width, float *weights, float *most, float *total, float *o) {
  if (key_width == 4 * W)
    dot_keys(q, k, places, m, weights, 4);
  else
    dot_keys(q, k, places, m, weights, key_width / W);
  for (int64_t i = m; i < m + W; i++) weights[i] = -INFINITY;
  vf highs = splat(*most);
  for (int64_t i = 0; i < m; i += W) highs = choose(load(weights + i) > highs, load(weights + i), highs);
  float high = *most;
  for (int i = 0; i < W; i++) high = highs[i] > high ? highs[i] : high;
  const float origin = high == -INFINITY ? 0 : high; /* logits that are all -inf weigh nothing */
  vf added = {};
  for (int64_t i = 0; i < m; i += W) {
    const vf w = power_of_two(load(weights + i) - origin);
    added += w;
    store(weights + i, w);
  }
  const float shrink = high > *most ? exp2f(*most - high) : 1;
  *most = high, *total = *total * shrink + across(added);
  for (int64_t d = 0; d < value_width; d += SUMS * W) {
    const int64_t wide = least(SUMS, (value_width - d) / W);
    if (wide == SUMS)
      add_values(v + d, places, weights, m, value_width, shrink, o + d, SUMS);
    else if (wide == SUMS / 2)
      add_values(v + d, places, weights, m, value_width, shrink, o + d, SUMS / 2);
    else
      add_values(v + d, places, weights, m, value_width, shrink, o + d, wide);
  }
}

/* The outputs o (count, V) of the queries q (count, K), of which query i has the keys places[i m], ..., kept[i] many
   and in their order. `to` is after the last key. */
static void attend_in_parts(const float *q, const float *k, const float *v, const int32_t *places, const int64_t *kept,
                            int64_t count, int64_t m, int64_t to, int64_t key_width, int64_t value_width, float *weights,
                            float *o) {
  const int64_t part = PART / (key_width + value_width) + 1;
  float most[TASK], total[TASK] = {};
  int64_t done[TASK] = {};
  for (int64_t i = 0; i < count; i++) most[i] = -INFINITY;
  memset(o, 0, (size_t)(count * value_width) * sizeof *o);
  for (int64_t end = part; end < to + part; end += part)
    for (int64_t i = 0; i < count; i++) {
      const int32_t *own = places + i * m + done[i];
      const int64_t left = kept[i] - done[i];
      int64_t here = 0;
      while (here < left && own[here] < end) here++;
      if (here)
        attend(q + i * key_width, k, v, own, here, key_width, value_width, weights, most + i, total + i,
               o + i * value_width);
      done[i] += here;
    }
  for (int64_t i = 0; i < count; i++) {
    const float inverse = 1.0f / total[i];
    for (int64_t d = 0; d < value_width; d += W)
      store(o + i * value_width + d, load(o + i * value_width + d) * inverse);
  }
}

/* work: work_size numbers for each thread. With `causal`, query i chooses among the keys j <= i. */
void selected_attention(const float *a, const float *b, const float *q, const float *k, const float *v, float *o,
                        float *work, int64_t heads, int64_t length, int64_t channels, int64_t stride,
                        int64_t key_width, int64_t value_width, int64_t m, int64_t causal, int64_t threads) {
  const int64_t tasks = (length + TASK - 1) / TASK;
#pragma omp parallel num_threads(threads)
  {
    float *scores = work + omp_get_thread_num() * work_size(stride, m), *weights = scores + ROWS * stride;
    int32_t *places = (int32_t *)(weights + m + W), *some = places + TASK * m + 16;
    float *some_scores = (float *)(some + stride);
    int64_t kept[TASK];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * tasks; task++) {
      const int64_t head = task / tasks, from = task % tasks * TASK, to = least(from + TASK, length);
      float guess = 1;
      for (int64_t first = from; first < to; first += ROWS) {
        const int64_t last = least(first + ROWS, to) - 1, most = causal ? last + 1 : length;
        const int64_t n = (most + PANEL - 1) / PANEL * PANEL;
        const float *rows[ROWS];
        for (int r = 0; r < ROWS; r++) rows[r] = a + (head * length + least(first + r, last)) * channels;
        score(rows, b + head * channels * stride, scores, channels, stride, n);
        for (int64_t i = first; i <= last; i++) {
          float *s = scores + (i - first) * stride;
          int32_t *own = places + (i - from) * m;
          const int64_t seen = causal ? i + 1 : length, count = least(m, seen);
          kept[i - from] = count;
          for (int64_t j = seen; j < n; j++) s[j] = -INFINITY;
          if (count == seen)
            for (int64_t j = 0; j < count; j++) own[j] = (int32_t)j;
          else
            select_largest(s, seen, n, count, &guess, own, some, some_scores);
        }
      }
      const int64_t at = head * length;
      attend_in_parts(q + (at + from) * key_width, k + at * key_width, v + at * value_width, places, kept, to - from, m,
                      causal ? to : length, key_width, value_width, weights, o + (at + from) * value_width);
    }
  }
}
