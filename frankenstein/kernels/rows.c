/* Rows of a matrix (n, d) on a CPU: RMS norm, dynamic tanh and their gradients, int8 codes, scaling of their products.

     r = 1 / sqrt(mean(x^2) + eps)     y = (x r) w     s = max(max|y|, 1e-5) / 127     c = round(y / s), half to even
     dx = (g r) w - x r^3 mean(x w g)     dw = sum over rows of g x r
     dynamic tanh: t = tanh(a x)     y = t w + b     dx = g w (1 - t^2) a     da = sum of g w (1 - t^2) x

   A row is read from memory once. Every row is worked on by one thread, and sums over rows are made in blocks of a
   fixed size, so that the bits do not depend on the number of threads.
   Matrices are float32, or bfloat16 where the argument `half` has their bit; all arithmetic is float32. */

#include "halves.h"
#include "vectors.h"

#include <math.h>

#define BLOCK 64   /* rows that share a partial sum of dw */
#define SMALL 8192 /* entries that are not worth a second thread */
#define FLOOR 1e-5f

int64_t block(void) { return BLOCK; }

/* A row to read: where it is, or widened into `room`. */
static inline const float *row_in(const void *x, int64_t row, int64_t d, int64_t half, float *room) {
  if (!half) return (const float *)x + row * d;
  widen((const uint16_t *)x + row * d, room, d);
  return room;
}

/* Where to write a row; `done` narrows what stands in `room`. */
static inline float *row_out(void *y, int64_t row, int64_t d, int64_t half, float *room) {
  return half ? room : (float *)y + row * d;
}
static inline void done(void *y, int64_t row, int64_t d, int64_t half, const float *room) {
  if (half) narrow(room, (uint16_t *)y + row * d, d);
}

/* The first n < W lanes; the others are 0. */
static inline vf load_part(const float *p, int64_t n) { vf v = {}; memcpy(&v, p, n * sizeof *p); return v; }
static inline void store_part(float *p, vf v, int64_t n) { memcpy(p, &v, n * sizeof *p); }

/* Runs BODY for every vector of a row: `at` is its place, `odd` the lowest bit of its number, which the compiler knows;
   GET and PUT move whole vectors, or the part at the end. */
#define EACH(d, BODY)                                  \
  do {                                                 \
    int64_t at = 0;                                    \
    _Pragma("GCC unroll 2") while (at + 2 * W <= (d)) { \
      { enum { odd = 0 }; BODY(load, store) }          \
      at += W;                                         \
      { enum { odd = 1 }; BODY(load, store) }          \
      at += W;                                         \
    }                                                  \
    if (at + W <= (d)) {                               \
      { enum { odd = 0 }; BODY(load, store) }          \
      at += W;                                         \
    }                                                  \
    if (at < (d)) {                                    \
      const int64_t rest = (d) - at, odd = at / W % 2; \
      (void)odd;                                       \
      BODY(LOAD_REST, STORE_REST)                      \
    }                                                  \
  } while (0)
#define LOAD_REST(p) load_part(p, rest)
#define STORE_REST(p, v) store_part(p, v, rest)

static inline float inverse_rms(const float *x, int64_t d, float eps) {
  vf sum[2] = {};
#define BODY(GET, PUT) const vf v = GET(x + at); sum[odd] += v * v;
  EACH(d, BODY);
#undef BODY
  return 1.0f / sqrtf(across(sum[0] + sum[1]) / (float)d + eps);
}

static inline vf absolute(vf v) { return (vf)((vi)v & 0x7fffffff); }

/* The larger sizes, NaN above all: the bits of numbers without a sign are in their order. */
static inline vf larger(vf a, vf b) { return choose((vi)a > (vi)b, a, b); }

static inline float largest_lane(vf v) {
  int32_t s[W], most = 0;
  memcpy(s, &v, sizeof v);
  for (int i = 0; i < W; i++) most = s[i] > most ? s[i] : most;
  float largest;
  memcpy(&largest, &most, sizeof largest);
  return largest;
}

/* Below 2^22 in size, the sum has no fraction bits left: rounding to nearest, half to even, is the addition's own. */
static inline vf rounded(vf v) { return (v + 12582912.0f) - 12582912.0f; }

void norm_forward(const float *x, const float *w, float *y, float *inverse, double eps, int64_t n, int64_t d,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t row = 0; row < n; row++) {
    const float *from = x + row * d;
    float *to = y + row * d;
    const float r = inverse[row] = inverse_rms(from, d, (float)eps);
#define BODY(GET, PUT) PUT(to + at, GET(from + at) * r * GET(w + at));
    EACH(d, BODY);
#undef BODY
  }
}

/* dw: (ceil(n / BLOCK), d), partial sums. */
void norm_backward(const void *x, const float *w, const float *inverse, const void *g, void *dx, float *dw, int64_t half,
                   int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t part = 0; part < (n + BLOCK - 1) / BLOCK; part++) {
    float *sum = dw + part * d, first[d], second[d], third[d];
    memset(sum, 0, d * sizeof *sum);
    for (int64_t row = part * BLOCK; row < least(n, (part + 1) * BLOCK); row++) {
      const float *from = row_in(x, row, d, half & FIRST, first), *grad = row_in(g, row, d, half & SECOND, second);
      const float r = inverse[row];
      float *to = row_out(dx, row, d, half & WRITTEN, third);
      vf along[2] = {};
#define BODY(GET, PUT)                                      \
  const vf product = GET(from + at) * GET(grad + at);       \
  along[odd] += product * GET(w + at);               \
  PUT(sum + at, GET(sum + at) + product * r);
      EACH(d, BODY);
#undef BODY
      const float shrink = r * r * r * across(along[0] + along[1]) / (float)d;
#define BODY(GET, PUT) PUT(to + at, GET(grad + at) * r * GET(w + at) - GET(from + at) * shrink);
      EACH(d, BODY);
#undef BODY
      done(dx, row, d, half & WRITTEN, to);
    }
  }
}

/* w and inverse are null where the rows are taken as they are. */
void quantize(const void *x, const float *w, void *codes, float *scale, float *inverse, double eps, int64_t half,
              int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t row = 0; row < n; row++) {
    float first[d], third[d], r = 1, *to = row_out(codes, row, d, half & WRITTEN, third);
    const float *from = row_in(x, row, d, half & FIRST, first);
    if (w) r = inverse[row] = inverse_rms(from, d, (float)eps);
    vf most = {};
#define BODY(GET, PUT)                                                       \
  const vf y = w ? GET(from + at) * r * GET(w + at) : GET(from + at);         \
  most = larger(absolute(y), most);                                          \
  PUT(to + at, y);
    EACH(d, BODY);
#undef BODY
    const float largest = largest_lane(most), s = scale[row] = (largest < FLOOR ? FLOOR : largest) / 127.0f;
#define BODY(GET, PUT) PUT(to + at, rounded(GET(to + at) / s));
    EACH(d, BODY);
#undef BODY
    done(codes, row, d, half & WRITTEN, to);
  }
}

/* (p s_row) s_column, which may take the place of p; scales (1,) or (d,) of the columns. */
void rescale(const void *p, const float *row_scale, const float *column_scale, void *y, int64_t half, int64_t n,
             int64_t d, int64_t scales, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t row = 0; row < n; row++) {
    float first[d], third[d], *to = row_out(y, row, d, half & WRITTEN, third), s = row_scale[row];
    const float *from = row_in(p, row, d, half & FIRST, first);
    if (scales == 1) {
      const float one = column_scale[0];
#define BODY(GET, PUT) PUT(to + at, GET(from + at) * s * one);
      EACH(d, BODY);
#undef BODY
    } else {
#define BODY(GET, PUT) PUT(to + at, GET(from + at) * s * GET(column_scale + at));
      EACH(d, BODY);
#undef BODY
    }
    done(y, row, d, half & WRITTEN, to);
  }
}

/* Ternary codes of the rows of a weight and their scales: s = max(mean|w|, 1e-5), c = clip(round(w / s), -1, 1). */
void ternarize(const float *w, void *codes, float *scale, int64_t half, int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t row = 0; row < n; row++) {
    const float *from = w + row * d;
    float third[d], *to = row_out(codes, row, d, half & WRITTEN, third);
    vf sum[2] = {};
#define BODY(GET, PUT) sum[odd] += absolute(GET(from + at));
    EACH(d, BODY);
#undef BODY
    const float mean = across(sum[0] + sum[1]) / (float)d, s = scale[row] = mean < FLOOR ? FLOOR : mean;
#define BODY(GET, PUT)                                                                    \
  const vf v = rounded(GET(from + at) / s);                                               \
  PUT(to + at, choose(v > splat(1.0f), splat(1.0f), choose(v < splat(-1.0f), splat(-1.0f), v)));
    EACH(d, BODY);
#undef BODY
    done(codes, row, d, half & WRITTEN, to);
  }
}

/* alpha (1,). */
void tanh_forward(const float *x, const float *alpha, const float *w, const float *b, float *y, int64_t n, int64_t d,
                  int64_t threads) {
  const vf a = splat(*alpha);
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t row = 0; row < n; row++) {
    const float *from = x + row * d;
    float *to = y + row * d;
#define BODY(GET, PUT) PUT(to + at, hyperbolic_tangent(a * GET(from + at)) * GET(w + at) + GET(b + at));
    EACH(d, BODY);
#undef BODY
  }
}

/* parts: (ceil(n / BLOCK), 3, d), partial sums of dw, db and of the terms of da. */
void tanh_backward(const float *x, const float *alpha, const float *w, const float *g, float *dx, float *parts,
                   int64_t n, int64_t d, int64_t threads) {
  const vf a = splat(*alpha);
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > SMALL)
  for (int64_t part = 0; part < (n + BLOCK - 1) / BLOCK; part++) {
    float *dw = parts + 3 * part * d, *db = dw + d, *da = db + d;
    memset(dw, 0, 3 * d * sizeof *dw);
    for (int64_t row = part * BLOCK; row < least(n, (part + 1) * BLOCK); row++) {
      const float *from = x + row * d, *grad = g + row * d;
      float *to = dx + row * d;
#define BODY(GET, PUT)                                                              \
  const vf v = GET(from + at), up = GET(grad + at), t = hyperbolic_tangent(a * v);  \
  const vf inner = up * GET(w + at) * (splat(1.0f) - t * t);                        \
  PUT(to + at, inner * a);                                                          \
  PUT(dw + at, GET(dw + at) + up * t);                                              \
  PUT(db + at, GET(db + at) + up);                                                  \
  PUT(da + at, GET(da + at) + inner * v);
      EACH(d, BODY);
#undef BODY
    }
  }
}
