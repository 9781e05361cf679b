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

/* Place of a step among the tokens of its row. */
static inline int64_t place(int64_t step, int64_t length, int64_t reverse) {
  return reverse ? length - 1 - step : step;
}

int64_t lanes(void) { return W; }
