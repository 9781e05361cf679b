/* Vectors of W float32 lanes, as wide as the processor has them. GNU C, for gcc and clang. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

static inline vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - (vf){}; }
static inline vf choose(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sum of the lanes. */
static inline float across(vf v) {
  float s[W];
  memcpy(s, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
#if W == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif W == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#endif

/* to[i] = sum of the lanes of rows[i]; several at once take a third of the instructions. */
static inline void sums(const vf *rows, float *to, int64_t count) {
  int64_t at = 0;
#ifdef SHUFFLES
  for (; at + W <= count; at += W) {
    vf v[W];
    for (int i = 0; i < W; i++) v[i] = rows[at + i];
#pragma GCC unroll 4
    for (int left = W / 2; left; left /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < left; i++)
        v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], EVEN) + __builtin_shufflevector(v[2 * i], v[2 * i + 1], ODD);
    store(to + at, v[0]);
  }
#endif
  for (; at < count; at++) to[at] = across(rows[at]);
}

/* 2^x to 2 units in the last place; 0 below the smallest normal number. 2^x = 2^n 2^f, n the nearest integer to x;
   2^f by its Taylor polynomial, whose remainder on |f| <= 1/2 is 1.2e-7 at degree 6. */
static inline vf power_of_two(vf x) {
  const vf shift = splat(12582912.0f); /* 1.5 2^23: adding it rounds to an integer, in the lowest bits */
  vi tiny = x < splat(-126.0f);
  x = choose(tiny, splat(-126.0f), x);
  x = choose(x > splat(128.0f), splat(128.0f), x);
  vf shifted = x + shift;
  vf f = x - (shifted - shift);
  vf p = splat(1.5403530e-4f);
  p = p * f + splat(1.3333558e-3f);
  p = p * f + splat(9.6181291e-3f);
  p = p * f + splat(5.5504109e-2f);
  p = p * f + splat(2.4022651e-1f);
  p = p * f + splat(6.9314718e-1f);
  p = p * f + splat(1.0f);
  p = (vf)((vi)p + (((vi)shifted - (vi)shift) << 23));
  return (vf)((vi)p & ~tiny);
}

/* tanh to 3e-7: by its series up to 0.3, whose remainder there is 1e-8 of the value, and by e^2x beyond. */
static inline vf hyperbolic_tangent(vf x) {
  const vf square = x * x, e = power_of_two(2.8853901f * x);
  vf series = splat(-1382.0f / 155925.0f);
  series = series * square + splat(62.0f / 2835.0f);
  series = series * square + splat(-17.0f / 315.0f);
  series = series * square + splat(2.0f / 15.0f);
  series = series * square + splat(-1.0f / 3.0f);
  series = (series * square) * x + x;
  const vf whole = splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
  const vf y = choose(square < splat(0.09f), series, whole);
  return choose(x != x, x, y);
}

/* Place of a step among the tokens of its row. */
static inline int64_t place(int64_t step, int64_t length, int64_t reverse) {
  return reverse ? length - 1 - step : step;
}

int64_t lanes(void) { return W; }
