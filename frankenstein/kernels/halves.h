/* bfloat16 in memory, float32 in registers. */

#include <stdint.h>
#include <string.h>

/* Bits of an argument `half`: which matrices are bfloat16: the first one read, the second one, the one written. */
enum { FIRST = 1, SECOND = 2, WRITTEN = 4 };

static inline void widen(const uint16_t *from, float *to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

/* To the nearest, half to even; NaN stays NaN. */
static inline void narrow(const float *from, uint16_t *to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
  }
}
