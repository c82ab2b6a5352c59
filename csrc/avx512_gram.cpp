// X^T X of bfloat16 rows, its upper triangle: vdpbf16ps multiplies pairs of rows, so pairs stand side by side.
//
// Columns come in panels of 16: the pairs (row 2t, row 2t+1) of a panel fill one vector each. A vector of column pairs
// and one pair of another column, repeated, give 16 entries of the result two rows further.
#include <immintrin.h>

#include "internal.h"

namespace wr {
namespace {

constexpr int64_t SIDE = 8, WIDE = 3;  // 8 columns by 3 panels: 24 sums, 3 vectors and 1 pair fit the registers

inline __m512i pair_of(const uint16_t *even, const uint16_t *odd, __mmask16 mask) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
    if (!odd) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void pack(const Gram &g, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
        int64_t column = panel * WR_TILE, left = g.size - column;
        __mmask16 mask = __mmask16(left >= WR_TILE ? 0xffff : (1 << left) - 1);
        for (int64_t t = 0; t < g.pairs; ++t) {
            const uint16_t *even = g.rows + 2 * t * g.stride + column;
            const uint16_t *odd = 2 * t + 1 < g.count ? even + g.stride : nullptr;
            _mm512_storeu_si512(g.packed + (panel * g.pairs + t) * WR_TILE, pair_of(even, odd, mask));
        }
    }
}

// Columns SIDE * i .. of the result's rows, panels first .. first + PANELS - 1 of its columns.
template <int PANELS>
void block(const Gram &g, int64_t i, int64_t first) {
    __m512 sum[SIDE][PANELS];
    for (int r = 0; r < SIDE; ++r)
        for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_setzero_ps();
    const uint32_t *left = g.packed + i / 2 * g.pairs * WR_TILE + i % 2 * SIDE;
    const uint32_t *right = g.packed + first * g.pairs * WR_TILE;
    for (int64_t t = 0; t < g.pairs; ++t, left += WR_TILE, right += WR_TILE) {
        __m512bh columns[PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) columns[p] = (__m512bh)_mm512_loadu_si512(right + p * g.pairs * WR_TILE);
#pragma GCC unroll 8
        for (int r = 0; r < SIDE; ++r) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(int(left[r]));
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], columns[p], both);
        }
    }
    for (int64_t r = 0; r < SIDE && SIDE * i + r < g.size; ++r)
        for (int p = 0; p < PANELS; ++p) {
            int64_t column = (first + p) * WR_TILE, rest = g.size - column;
            __mmask16 mask = __mmask16(rest >= WR_TILE ? 0xffff : (1 << rest) - 1);
            float *at = g.upper + (SIDE * i + r) * g.size + column;
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum[r][p]));
        }
}

// Units count through the result's rows in steps of SIDE within a group of WIDE panels, group after group.
void add(const Gram &g, int64_t begin, int64_t end) {
    int64_t panels = (g.size + WR_TILE - 1) / WR_TILE, unit = 0;
    for (int64_t first = 0; first < panels; first += WIDE) {
        int64_t count = panels - first < WIDE ? panels - first : WIDE, sides = 2 * (first + count);
        for (int64_t i = begin > unit ? begin - unit : 0; i < sides && unit + i < end; ++i) {
            if (count == 3)
                block<3>(g, i, first);
            else if (count == 2)
                block<2>(g, i, first);
            else
                block<1>(g, i, first);
        }
        unit += sides;
    }
}

int64_t units(int64_t size) {
    int64_t panels = (size + WR_TILE - 1) / WR_TILE, all = 0;
    for (int64_t first = 0; first < panels; first += WIDE) all += 2 * (panels - first < WIDE ? panels : first + WIDE);
    return all;
}

}  // namespace

const GramKernel &avx512_gram() {
    static const GramKernel kernel = {pack, add, units};
    return kernel;
}

}  // namespace wr
