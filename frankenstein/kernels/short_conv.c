/* Depthwise convolution over time on a CPU, (B, T, D):

     y_t = b + sum_j w_j x_(t + first + j)     dx_s = sum_j w_j g_(s - first - j)     dw_j = sum_t g_t x_(t + first + j)

   j = 0 .. C-1; what lies outside of the row is 0. w (C, D). Matrices are float32, or bfloat16 where `half` has their
   bit; all arithmetic is float32. Work is split by rows and blocks of channels, each of which has sums of its own over
   the tokens, so that the bits do not depend on the number of threads. */

#include "halves.h"

#define BLOCK 64 /* channels */

int64_t block(void) { return BLOCK; }

typedef struct {
  int64_t rows, length, width, taps, first, half;
} sizes;

typedef struct {
  const float *at; /* the block's first channel of the first token */
  int64_t stride;  /* between tokens */
} strip;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* n channels of a row, widened into `room` (length, BLOCK) if they are bfloat16. */
static strip strip_of(const void *x, const sizes *s, int64_t row, int64_t channel, int64_t n, int64_t half, float *room) {
  const int64_t start = row * s->length * s->width + channel;
  if (!half) return (strip){(const float *)x + start, s->width};
  for (int64_t t = 0; t < s->length; t++) widen((const uint16_t *)x + start + t * s->width, room + t * BLOCK, n);
  return (strip){room, BLOCK};
}

static void write(void *y, int64_t at, const float *from, int64_t n, int64_t half) {
  if (half) narrow(from, (uint16_t *)y + at, n);
  else memcpy((float *)y + at, from, n * sizeof *from);
}

/* sum += sum over taps of w_tap * x_(start + direction * tap), where that token exists. */
static inline void filter(float *restrict sum, const float *restrict w, strip x, int64_t start, int64_t direction,
                          const sizes *s, int64_t n) {
  for (int64_t tap = 0; tap < s->taps; tap++) {
    const int64_t token = start + direction * tap;
    if (token < 0 || token >= s->length) continue;
    const float *restrict from = x.at + token * x.stride, *restrict by = w + tap * s->width;
    for (int64_t c = 0; c < n; c++) sum[c] += by[c] * from[c];
  }
}

/* bias may be null. room: (threads, 2, T, BLOCK), used where a matrix that is read is bfloat16. */
void conv_forward(const void *x, const float *w, const float *bias, void *y, float *room, int64_t rows, int64_t length,
                  int64_t width, int64_t taps, int64_t first, int64_t half, int64_t threads) {
  const sizes s = {rows, length, width, taps, first, half};
  const int64_t blocks = (width + BLOCK - 1) / BLOCK, items = rows * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t worker = 0; worker < threads; worker++)
    for (int64_t item = worker * items / threads; item < (worker + 1) * items / threads; item++) {
      const int64_t row = item / blocks, channel = item % blocks * BLOCK, n = least(BLOCK, width - channel);
      const strip in = strip_of(x, &s, row, channel, n, half & FIRST, room + worker * 2 * length * BLOCK);
      for (int64_t t = 0; t < length; t++) {
        float sum[BLOCK] = {0};
        if (bias) memcpy(sum, bias + channel, n * sizeof *sum);
        filter(sum, w + channel, in, t + first, 1, &s, n);
        write(y, (row * length + t) * width + channel, sum, n, half & WRITTEN);
      }
    }
}

/* dw (B, C, D) and db (B, D): sums over the tokens of each row. */
void conv_backward(const void *x, const float *w, const void *g, void *dx, float *dw, float *db, float *room,
                   int64_t rows, int64_t length, int64_t width, int64_t taps, int64_t first, int64_t half,
                   int64_t threads) {
  const sizes s = {rows, length, width, taps, first, half};
  const int64_t blocks = (width + BLOCK - 1) / BLOCK, items = rows * blocks;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t worker = 0; worker < threads; worker++)
    for (int64_t item = worker * items / threads; item < (worker + 1) * items / threads; item++) {
      const int64_t row = item / blocks, channel = item % blocks * BLOCK, n = least(BLOCK, width - channel);
      float *own = room + worker * 2 * length * BLOCK;
      const strip in = strip_of(x, &s, row, channel, n, half & FIRST, own);
      const strip grad = strip_of(g, &s, row, channel, n, half & SECOND, own + length * BLOCK);
      for (int64_t t = 0; t < length; t++) {
        float sum[BLOCK] = {0};
        filter(sum, w + channel, grad, t - first, -1, &s, n);
        write(dx, (row * length + t) * width + channel, sum, n, half & WRITTEN);
      }
      for (int64_t tap = 0; tap < taps; tap++) {
        float sum[BLOCK] = {0};
        const int64_t shift = first + tap;
        for (int64_t t = most(0, -shift); t < least(length, length - shift); t++) {
          const float *restrict a = grad.at + t * grad.stride, *restrict b = in.at + (t + shift) * in.stride;
          for (int64_t c = 0; c < n; c++) sum[c] += a[c] * b[c];
        }
        memcpy(dw + (row * taps + tap) * width + channel, sum, n * sizeof *sum);
      }
      float sum[BLOCK] = {0};
      for (int64_t t = 0; t < length; t++)
        for (int64_t c = 0; c < n; c++) sum[c] += grad.at[t * grad.stride + c];
      memcpy(db + row * width + channel, sum, n * sizeof *sum);
    }
}
