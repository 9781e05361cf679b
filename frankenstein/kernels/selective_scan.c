/* The recurrence of the selective scan on a CPU in float32; its equations stand in mixers/tiled_scan.py.

   Lanes of a vector are neighbouring channels, so that no step sums across lanes, and the state of W channels, N
   vectors, stays in the first-level cache. What is kept for the backward pass is the state that enters each chunk of
   CHUNK tokens; the chunk's own states are computed again.
   u, dt, y (B, T, D); A (N, D), times log2(e); B, C (B, T, N); starts (B, ceil(T / CHUNK), N, D); D % W == 0.
   Work is split by shape alone (rows, strips of channels), so that the bits do not depend on the number of threads. */

#include "vectors.h"

#define CHUNK 16
#define STRIP 64 /* channels of a worker; a multiple of W */

int64_t chunk(void) { return CHUNK; }
int64_t strip(void) { return STRIP; }

typedef struct {
  int64_t rows, length, width, states, chunks, strips;
} sizes;

static sizes measure(int64_t rows, int64_t length, int64_t width, int64_t states) {
  return (sizes){rows, length, width, states, (length + CHUNK - 1) / CHUNK, (width + STRIP - 1) / STRIP};
}

/* last (B, N, D) is the last state; starts is NULL where no backward pass follows. */
void scan_forward(const float *u, const float *dt, const float *A, const float *B, const float *C, float *y,
                  float *last, float *starts, int64_t rows, int64_t length, int64_t width, int64_t states,
                  int64_t reverse, int64_t threads) {
  const sizes s = measure(rows, length, width, states);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < s.rows * s.strips; item++) {
    const int64_t row = item / s.strips, from = item % s.strips * STRIP, to = least(from + STRIP, width);
    vf rate[states], h[states];
    for (int64_t d = from; d < to; d += W) {
      for (int64_t n = 0; n < states; n++) rate[n] = load(A + n * width + d), h[n] = (vf){};
      for (int64_t step = 0; step < length; step++) {
        const int64_t token = row * length + place(step, length, reverse);
        const vf size = load(dt + token * width + d), x = size * load(u + token * width + d);
        const float *b = B + token * states, *c = C + token * states;
        if (starts && step % CHUNK == 0) {
          float *kept = starts + (row * s.chunks + step / CHUNK) * states * width + d;
          for (int64_t n = 0; n < states; n++) store(kept + n * width, h[n]);
        }
        vf out = {};
        for (int64_t n = 0; n < states; n++) {
          h[n] = power_of_two(size * rate[n]) * h[n] + b[n] * x;
          out += c[n] * h[n];
        }
        store(y + token * width + d, out);
      }
      for (int64_t n = 0; n < states; n++) store(last + (row * states + n) * width + d, h[n]);
    }
  }
}

/* d_state (B, N, D): gradient of the last state, on return of the first. dA (B, N, D) is to be summed over rows, dB and
   dC (strips, B, T, N) over strips. work: 2 CHUNK N W numbers for each thread. */
void scan_backward(const float *u, const float *dt, const float *A, const float *B, const float *C,
                   const float *starts, const float *dy, float *d_state, float *du, float *d_dt, float *dA, float *dB,
                   float *dC, float *work, int64_t rows, int64_t length, int64_t width, int64_t states,
                   int64_t reverse, int64_t threads) {
  const sizes s = measure(rows, length, width, states);
  const float ln2 = 0.69314718f;
  const int64_t block = CHUNK * states * W, items = s.rows * s.strips;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t worker = 0; worker < threads; worker++) {
    float *into = work + worker * 2 * block, *read = into + block; /* of dB and dC, lane by lane */
    for (int64_t item = worker * items / threads; item < (worker + 1) * items / threads; item++) {
      const int64_t row = item / s.strips, which = item % s.strips;
      const int64_t from = which * STRIP, to = least(from + STRIP, width);
      for (int64_t k = s.chunks - 1; k >= 0; k--) {
        const int64_t first = k * CHUNK, count = least(CHUNK, length - first);
        memset(into, 0, 2 * block * sizeof *into);
        for (int64_t d = from; d < to; d += W) {
          const float *start = starts + (row * s.chunks + k) * states * width + d;
          const int64_t state_at = row * states * width + d;
          vf g_total[CHUNK], q_total[CHUNK], x[CHUNK], kept[CHUNK], before[CHUNK];
          for (int64_t i = 0; i < count; i++) {
            const int64_t token = row * length + place(first + i, length, reverse);
            x[i] = load(dt + token * width + d) * load(u + token * width + d);
            g_total[i] = q_total[i] = (vf){};
          }
          for (int64_t n = 0; n < states; n++) {
            const vf rate = load(A + n * width + d);
            vf h = load(start + n * width), g = load(d_state + state_at + n * width);
            vf d_rate = load(dA + state_at + n * width);
            for (int64_t i = 0; i < count; i++) {
              const int64_t token = row * length + place(first + i, length, reverse);
              kept[i] = power_of_two(load(dt + token * width + d) * rate);
              before[i] = h;
              h = kept[i] * h + B[token * states + n] * x[i];
            }
            for (int64_t i = count - 1; i >= 0; i--) {
              const int64_t token = row * length + place(first + i, length, reverse);
              const vf d_out = load(dy + token * width + d);
              const float b = B[token * states + n];
              float *gb = into + (i * states + n) * W, *gc = read + (i * states + n) * W;
              store(gc, load(gc) + d_out * (kept[i] * before[i] + b * x[i]));
              g += C[token * states + n] * d_out;
              store(gb, load(gb) + g * x[i]);
              g_total[i] += b * g;
              g *= kept[i]; /* now the gradient of the state before */
              const vf q = g * before[i];
              q_total[i] += rate * q;
              d_rate += load(dt + token * width + d) * q;
            }
            store(d_state + state_at + n * width, g);
            store(dA + state_at + n * width, d_rate);
          }
          for (int64_t i = 0; i < count; i++) {
            const int64_t at = (row * length + place(first + i, length, reverse)) * width + d;
            store(du + at, g_total[i] * load(dt + at));
            store(d_dt + at, q_total[i] * ln2 + g_total[i] * load(u + at));
          }
        }
        for (int64_t i = 0; i < count; i++) {
          const int64_t token = row * length + place(first + i, length, reverse);
          const int64_t at = (which * rows * length + token) * states;
          for (int64_t n = 0; n < states; n++) {
            dB[at + n] = across(load(into + (i * states + n) * W));
            dC[at + n] = across(load(read + (i * states + n) * W));
          }
        }
      }
    }
  }
}
