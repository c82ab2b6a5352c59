// X^T X of bfloat16 rows, its upper triangle: packed once, the rows are both sides of the product.
#include "avx512_tile.h"

namespace wr {
namespace {

constexpr int64_t SIDE = 8, WIDE = 3;  // 8 columns by 3 panels: 24 sums, 3 vectors and 1 pair fit the registers

void pack(const Gram &g, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
        int64_t column = panel * WR_TILE;
        pack_rows(g.rows + column, g.count, g.stride, first_lanes(g.size - column), g.packed + panel * g.pairs * WR_TILE);
    }
}

// Columns SIDE * i .. of the result's rows, panels first .. first + PANELS - 1 of its columns.
template <int PANELS>
void block(const Gram &g, int64_t i, int64_t first) {
    __m512 sum[SIDE][PANELS];
    const uint32_t *left = g.packed + i / 2 * g.pairs * WR_TILE + i % 2 * SIDE;
    tile<SIDE, PANELS>(left, 1, WR_TILE, g.packed + first * g.pairs * WR_TILE, g.pairs, g.pairs, sum);
    for (int64_t r = 0; r < SIDE && SIDE * i + r < g.size; ++r)
        for (int p = 0; p < PANELS; ++p) {
            int64_t column = (first + p) * WR_TILE;
            __mmask16 mask = first_lanes(g.size - column);
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

const GramKernel avx512_gram = {pack, add, units};

}  // namespace wr
