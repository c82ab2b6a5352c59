// The inner tile of products of bfloat16 pairs, shared by the files that multiply activations with activations.
//
// A panel is 16 columns: the pairs (2t, 2t+1) along the summed dimension of all 16 fill one vector, pair after pair. One
// pair of a row, repeated over a vector, times a panel's vector adds two products to each of 16 sums.
#pragma once
#include <immintrin.h>

#include "internal.h"

namespace wr {
namespace {

inline __mmask16 first_lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1 << (count < 0 ? 0 : count)) - 1); }

// sum[r][p] = rows r, panels p; pair t of row r stands at left[r * row + t * step], panels `apart` vectors from another.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void tile(const uint32_t *left, int64_t row, int64_t step, const uint32_t *right,
                                                int64_t apart, int64_t pairs, __m512 (&sum)[ROWS][PANELS]) {
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_setzero_ps();
    for (int64_t t = 0; t < pairs; ++t, left += step, right += 16) {
        __m512bh columns[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) columns[p] = (__m512bh)_mm512_loadu_si512(right + p * apart * 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(int(left[r * row]));
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], columns[p], both);
        }
    }
}

// A panel of columns whose pairs are two rows each: `count` rows of bfloat16, `stride` apart; a missing row is zero.
inline void pack_rows(const uint16_t *rows, int64_t count, int64_t stride, __mmask16 mask, uint32_t *panel) {
    for (int64_t t = 0; t < (count + 1) / 2; ++t, rows += 2 * stride, panel += 16) {
        __m512i pair = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows));
        if (2 * t + 1 < count) {
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows + stride));
            pair = _mm512_or_si512(pair, _mm512_slli_epi32(odd, 16));
        }
        _mm512_storeu_si512(panel, pair);
    }
}

}  // namespace
}  // namespace wr
