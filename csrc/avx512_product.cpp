// A^T B of bfloat16 rows, both sides packed alike. X^T X packs its rows once and leaves out what is below the diagonal.
#include "avx512_tile.h"

namespace wr {
namespace {

constexpr int64_t SIDE = 8, WIDE = 3;  // 8 columns by 3 panels: 24 sums, 3 vectors and 1 pair fit the registers
constexpr int64_t BLOCK = 16;          // steps of SIDE: 256 kB of 1024 rows

void pack(const Columns &c, int64_t count, int64_t begin, int64_t end) {
    int64_t words = (count + 1) / 2 * WR_TILE;
    for (int64_t panel = begin; panel < end; ++panel) {
        int64_t column = panel * WR_TILE;
        pack_rows(c.rows + column, count, c.stride, first_lanes(c.size - column), c.packed + panel * words);
    }
}

// Columns SIDE * i .. of the left make the result's rows, panels first .. first + PANELS - 1 of the right its columns.
template <int PANELS>
void block(const Product &p, int64_t i, int64_t first) {
    __m512 sum[SIDE][PANELS];
    const uint32_t *left = p.left.packed + i / 2 * p.pairs * WR_TILE + i % 2 * SIDE;
    tile<SIDE, PANELS>(left, 1, WR_TILE, p.right.packed + first * p.pairs * WR_TILE, p.pairs, p.pairs, sum);
    for (int64_t r = 0; r < SIDE && SIDE * i + r < p.left.size; ++r)
        for (int panel = 0; panel < PANELS; ++panel) {
            int64_t column = (first + panel) * WR_TILE;
            __mmask16 mask = first_lanes(p.right.size - column);
            float *at = p.total + (SIDE * i + r) * p.right.size + column;
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum[r][panel]));
        }
}

// Units, each a block, count through BLOCK steps of SIDE rows of the result for one group of WIDE panels after another,
// then through the next BLOCK steps: of the left so much stays in a core's second cache while the right goes by once.
template <typename Body>
void by_groups(const Product &p, const Body &body) {  // body(first panel, how many, first step, end of the steps)
    int64_t panels = (p.right.size + WR_TILE - 1) / WR_TILE, steps = (p.left.size + SIDE - 1) / SIDE;
    for (int64_t from = 0; from < steps; from += BLOCK) {
        int64_t to = steps - from < BLOCK ? steps : from + BLOCK;
        for (int64_t first = 0; first < panels; first += WIDE) {
            int64_t count = panels - first < WIDE ? panels - first : WIDE, above = 2 * (first + count);
            if (!p.upper || to <= above)
                body(first, count, from, to);
            else if (from < above)
                body(first, count, from, above);
        }
    }
}

void add(const Product &p, int64_t begin, int64_t end) {
    int64_t unit = 0;
    by_groups(p, [&](int64_t first, int64_t count, int64_t from, int64_t to) {
        int64_t i = from + (begin > unit ? begin - unit : 0), last = to - from < end - unit ? to : from + end - unit;
        unit += to - from;
        for (; i < last; ++i) {
            if (count == 3)
                block<3>(p, i, first);
            else if (count == 2)
                block<2>(p, i, first);
            else
                block<1>(p, i, first);
        }
    });
}

int64_t units(const Product &p) {
    int64_t all = 0;
    by_groups(p, [&](int64_t, int64_t, int64_t from, int64_t to) { all += to - from; });
    return all;
}

}  // namespace

const ProductKernel avx512_product = {pack, add, units};

}  // namespace wr
