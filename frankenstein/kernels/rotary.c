/* Rotary positions on a CPU: pairs of channels (a, b) of token t turned by the angle of (cos, sin)_(t, i):

     (x_a, x_b) -> (x_a cos - x_b sin, x_a sin + x_b cos)

   The pair of angle i is (2 i, 2 i + 1), or (i, i + K / 2) with `split`. `turn` 1 turns, -1 turns back.
   x (B, T, H, K) has strides of its own between tokens and rows of tokens; y is contiguous. Matrices are float32, or
   bfloat16 where `half` has their bit. */

#include "halves.h"

#define WIDEST 1024 /* channels of a head */

int64_t widest(void) { return WIDEST; }

static inline void turned(const float *restrict x, const float *restrict angles, float *restrict y, int64_t keys,
                          int64_t split, float turn) {
  if (split) {
    const int64_t other = keys / 2;
    for (int64_t i = 0; i < other; i++) {
      const float c = angles[2 * i], s = turn * angles[2 * i + 1], a = x[i], b = x[i + other];
      y[i] = a * c - b * s;
      y[i + other] = a * s + b * c;
    }
  } else {
    for (int64_t i = 0; i < keys; i += 2) {
      const float c = angles[i], s = turn * angles[i + 1], a = x[i], b = x[i + 1];
      y[i] = a * c - b * s;
      y[i + 1] = a * s + b * c;
    }
  }
}

/* angles (T, K / 2, 2): cosine and sine. Strides in entries: of a row of tokens, a token, a head. */
void rotate(const void *x, const float *angles, void *y, int64_t rows, int64_t length, int64_t heads, int64_t keys,
            int64_t row_stride, int64_t token_stride, int64_t head_stride, int64_t split, int64_t back, int64_t half,
            int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * length * heads * keys > 8192)
  for (int64_t at = 0; at < rows * length; at++) {
    const int64_t token = at % length;
    const int64_t start = at / length * row_stride + token * token_stride;
    float wide[WIDEST], narrowed[WIDEST];
    for (int64_t head = 0; head < heads; head++) {
      const int64_t from = start + head * head_stride, to = (at * heads + head) * keys;
      const float *in = (const float *)x + from;
      float *out = half & WRITTEN ? narrowed : (float *)y + to;
      if (half & FIRST) widen((const uint16_t *)x + from, wide, keys), in = wide;
      turned(in, angles + token * keys, out, keys, split, back ? -1.0f : 1.0f);
      if (half & WRITTEN) narrow(narrowed, (uint16_t *)y + to, keys);
    }
  }
}
