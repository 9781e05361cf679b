/* Titans' linear memory, token by token, on a CPU in float32. With w = 2 theta and a = 1 - alpha, in one direction

     e_t = v_t - M_(t-1)^T k_t     S_t = eta_t S_(t-1) + w_t k_t e_t^T     M_t = a_t M_(t-1) + S_t     o_t = M_t^T q_t

   Source: Behrouz et al. 2025, eq. 13-15, https://arxiv.org/abs/2501.00663.
   A head's states (K, V) stay in the caches of one core; lanes are neighbours in V. Kept for the backward pass are the
   states that enter each chunk; the others are computed again. In both directions, the second one goes from the last
   token to the first, and w (q . k) v, which both count, is taken away once.
   q, k (B, T, H, K); v, o (B, T, H, V); gates (3 or 6, B, T, H): w, a, eta, and the same again where the second
   direction has its own; V % W == 0. Work is split by heads, so that the bits do not depend on the number of threads. */

#include "vectors.h"

#define CHUNK 32

int64_t chunk(void) { return CHUNK; }

typedef struct {
  int64_t rows, length, heads, keys, values, directions, gates;
} sizes;

/* One head of one row in one direction: strides in tokens, and gates of its own. */
typedef struct {
  int64_t length, keys, values, heads, first, reverse;
  const float *w, *a, *eta;
} lane;

static inline int64_t token_of(const lane *x, int64_t step) {
  return x->first + place(step, x->length, x->reverse) * x->heads;
}

static inline lane lane_of(const sizes *s, const float *gates, int64_t item, int64_t direction) {
  const int64_t row = item / s->heads, one = s->rows * s->length * s->heads;
  const float *own = gates + (direction && s->gates == 6 ? 3 * one : 0);
  return (lane){s->length, s->keys, s->values, s->heads, row * s->length * s->heads + item % s->heads, direction,
                own, own + one, own + 2 * one};
}

/* One token: the states M and S (K, V) become those of `to`, M over S, which may be the same place; the error and the
   output; n vectors in V. With d_out, `read` has the terms of M_t d_out. */
static inline __attribute__((always_inline)) void step_forward(
    const lane *x, int64_t at, const float *q, const float *k, const float *v, const float *M, float *to, vf *error,
    vf *out, const vf *d_out, vf *read, const int64_t n) {
  const int64_t half = x->keys * x->values;
  const float *key = k + at * x->keys, *query = q + at * x->keys, *value = v + at * x->values, *S = M + half;
  const vf a = splat(x->a[at]), eta = splat(x->eta[at]);
  vf write[n];
  for (int64_t j = 0; j < n; j++) error[j] = load(value + j * W);
  for (int64_t i = 0; i < x->keys; i++)
    for (int64_t j = 0; j < n; j++) error[j] -= key[i] * load(M + i * x->values + j * W);
  for (int64_t j = 0; j < n; j++) write[j] = x->w[at] * error[j], out[j] = (vf){};
  for (int64_t i = 0; i < x->keys; i++) {
    vf along = {};
    for (int64_t j = 0; j < n; j++) {
      const int64_t p = i * x->values + j * W;
      const vf momentum = eta * load(S + p) + key[i] * write[j], memory = a * load(M + p) + momentum;
      store(to + half + p, momentum);
      store(to + p, memory);
      if (d_out) along += memory * d_out[j];
      else out[j] += query[i] * memory;
    }
    if (d_out) read[i] = along;
  }
}

static inline __attribute__((always_inline)) void head_forward(
    const sizes *s, const float *q, const float *k, const float *v, const float *gates, float *o, float *state,
    float *starts, int64_t item, const int64_t n) {
  const int64_t half = s->keys * s->values, chunks = (s->length + CHUNK - 1) / CHUNK, items = s->rows * s->heads;
  for (int64_t direction = 0; direction < s->directions; direction++) {
    const lane x = lane_of(s, gates, item, direction);
    float *M = state + item * 2 * half;
    if (direction) memset(M, 0, 2 * half * sizeof *M);
    for (int64_t step = 0; step < s->length; step++) {
      const int64_t at = token_of(&x, step);
      if (starts && step % CHUNK == 0)
        memcpy(starts + ((direction * chunks + step / CHUNK) * items + item) * 2 * half, M, 2 * half * sizeof *M);
      vf error[n], out[n];
      step_forward(&x, at, q, k, v, M, M, error, out, 0, 0, n);
      float own = 0, *to = o + at * s->values;
      if (!direction && s->directions == 2)
        for (int64_t i = 0; i < s->keys; i++) own -= q[at * s->keys + i] * k[at * s->keys + i];
      for (int64_t j = 0; j < n; j++) {
        const vf before = direction ? load(to + j * W) : own * x.w[at] * load(v + at * s->values + j * W);
        store(to + j * W, before + out[j]);
      }
    }
  }
}

/* state (B, H, 2 K, V) is M over S: of the first token at the start, of the last one on return (in one direction). */
void memory_forward(const float *q, const float *k, const float *v, const float *gates, float *o, float *state,
                    float *starts, int64_t rows, int64_t length, int64_t heads, int64_t keys, int64_t values,
                    int64_t directions, int64_t gate_count, int64_t threads) {
  const sizes s = {rows, length, heads, keys, values, directions, gate_count};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < rows * heads; item++) switch (values / W) {
      case 1: head_forward(&s, q, k, v, gates, o, state, starts, item, 1); break;
      case 2: head_forward(&s, q, k, v, gates, o, state, starts, item, 2); break;
      case 4: head_forward(&s, q, k, v, gates, o, state, starts, item, 4); break;
      case 8: head_forward(&s, q, k, v, gates, o, state, starts, item, 8); break;
      default: head_forward(&s, q, k, v, gates, o, state, starts, item, values / W);
    }
}

typedef struct {
  const float *q, *k, *v, *gates, *starts, *d_o;
  float *d_q, *d_k, *d_v, *d_gates, *d_state;
} tensors;

/* One token of the backward pass: dM and dS become those of the states before it, M and S. */
static inline __attribute__((always_inline)) void step_backward(
    const lane *x, const tensors *t, int64_t at, const float *M, const float *S, const vf *error, float *dM, float *dS,
    float *d_gate, int64_t one, const int64_t n) {
  const float *key = t->k + at * x->keys, *query = t->q + at * x->keys, w = x->w[at];
  const vf a = splat(x->a[at]), eta = splat(x->eta[at]);
  float *d_key = t->d_k + at * x->keys, *d_value = t->d_v + at * x->values;
  vf d_out[n], d_error[n], terms[x->keys], d_keep = {}, d_eta = {};
  float along[x->keys], d_w = 0;
  for (int64_t j = 0; j < n; j++) d_out[j] = load(t->d_o + at * x->values + j * W), d_error[j] = (vf){};
  for (int64_t i = 0; i < x->keys; i++) {
    vf written = {};
    for (int64_t j = 0; j < n; j++) {
      const int64_t p = i * x->values + j * W;
      const vf d_memory = load(dM + p) + query[i] * d_out[j], d_momentum = load(dS + p) + d_memory;
      store(dM + p, d_memory);
      store(dS + p, eta * d_momentum);
      written += d_momentum * error[j];
      d_error[j] += key[i] * d_momentum;
      d_keep += d_memory * load(M + p);
      d_eta += d_momentum * load(S + p);
    }
    terms[i] = written;
  }
  sums(terms, along, x->keys);
  for (int64_t i = 0; i < x->keys; i++) d_key[i] += w * along[i], d_w += key[i] * along[i];
  for (int64_t j = 0; j < n; j++) {
    d_error[j] *= w;
    store(d_value + j * W, load(d_value + j * W) + d_error[j]);
  }
  for (int64_t i = 0; i < x->keys; i++) {
    vf compared = {};
    for (int64_t j = 0; j < n; j++) {
      const int64_t p = i * x->values + j * W;
      compared += load(M + p) * d_error[j];
      store(dM + p, a * load(dM + p) - key[i] * d_error[j]);
    }
    terms[i] = compared;
  }
  sums(terms, along, x->keys);
  for (int64_t i = 0; i < x->keys; i++) d_key[i] -= along[i];
  d_gate[at] += d_w;
  d_gate[one + at] += across(d_keep);
  d_gate[2 * one + at] += across(d_eta);
}

/* The gradient of - w (q . k) v. */
static void own_backward(const lane *x, const tensors *t, int64_t at) {
  const float *key = t->k + at * x->keys, *query = t->q + at * x->keys;
  const float *value = t->v + at * x->values, *d_out = t->d_o + at * x->values;
  float dot = 0, along = 0;
  for (int64_t i = 0; i < x->keys; i++) dot += query[i] * key[i];
  for (int64_t j = 0; j < x->values; j++) {
    along += d_out[j] * value[j];
    t->d_v[at * x->values + j] -= x->w[at] * dot * d_out[j];
  }
  for (int64_t i = 0; i < x->keys; i++) {
    t->d_q[at * x->keys + i] -= x->w[at] * along * key[i];
    t->d_k[at * x->keys + i] -= x->w[at] * along * query[i];
  }
  t->d_gates[at] -= dot * along;
}

static inline __attribute__((always_inline)) void head_backward(
    const sizes *s, const tensors *t, float *work, int64_t item, const int64_t n) {
  const int64_t half = s->keys * s->values, chunks = (s->length + CHUNK - 1) / CHUNK, items = s->rows * s->heads;
  const int64_t one = s->rows * s->length * s->heads;
  float *dM = t->d_state + item * 2 * half, *dS = dM + half; /* work: M and S before each token, and after the last */
  for (int64_t direction = s->directions - 1; direction >= 0; direction--) {
    const lane x = lane_of(s, t->gates, item, direction);
    float *d_gate = t->d_gates + (direction && s->gates == 6 ? 3 * one : 0);
    for (int64_t c = chunks - 1; c >= 0; c--) {
      const int64_t first = c * CHUNK, count = least(CHUNK, s->length - first);
      vf error[CHUNK][n], out[n], d_out[n], read[s->keys];
      float d_query[s->keys];
      memcpy(work, t->starts + ((direction * chunks + c) * items + item) * 2 * half, 2 * half * sizeof *work);
      for (int64_t i = 0; i < count; i++) {
        const int64_t at = token_of(&x, first + i);
        const float *M = work + i * 2 * half;
        for (int64_t j = 0; j < n; j++) d_out[j] = load(t->d_o + at * s->values + j * W);
        step_forward(&x, at, t->q, t->k, t->v, M, work + (i + 1) * 2 * half, error[i], out, d_out, read, n);
        sums(read, d_query, s->keys);
        for (int64_t j = 0; j < s->keys; j++) t->d_q[at * s->keys + j] += d_query[j];
      }
      for (int64_t i = count - 1; i >= 0; i--) {
        const int64_t at = token_of(&x, first + i);
        const float *M = work + i * 2 * half;
        step_backward(&x, t, at, M, M + half, error[i], dM, dS, d_gate, one, n);
        if (!direction && s->directions == 2) own_backward(&x, t, at);
      }
    }
    if (direction) memset(dM, 0, 2 * half * sizeof *dM);
  }
}

/* d_q, d_k, d_v and d_gates are added to. d_state: gradient of the last states, on return of the first (in one
   direction; in both it is 0 at the start). work: 2 (CHUNK + 1) K V numbers for each thread. */
void memory_backward(const float *q, const float *k, const float *v, const float *gates, const float *starts,
                     const float *d_o, float *d_q, float *d_k, float *d_v, float *d_gates, float *d_state, float *work,
                     int64_t rows, int64_t length, int64_t heads, int64_t keys, int64_t values, int64_t directions,
                     int64_t gate_count, int64_t threads) {
  const sizes s = {rows, length, heads, keys, values, directions, gate_count};
  const tensors t = {q, k, v, gates, starts, d_o, d_q, d_k, d_v, d_gates, d_state};
  const int64_t items = rows * heads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t worker = 0; worker < threads; worker++) {
    float *own = work + worker * 2 * (CHUNK + 1) * keys * values;
    for (int64_t item = worker * items / threads; item < (worker + 1) * items / threads; item++) switch (values / W) {
        case 1: head_backward(&s, &t, own, item, 1); break;
        case 2: head_backward(&s, &t, own, item, 2); break;
        case 4: head_backward(&s, &t, own, item, 4); break;
        case 8: head_backward(&s, &t, own, item, 8); break;
        default: head_backward(&s, &t, own, item, values / W);
      }
  }
}
