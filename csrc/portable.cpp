// Plain C++: right on every machine, and what the other instruction sets are tested against.
#include "internal.h"
#include "solver.h"

namespace wr {
namespace {

template <int BITS>
void multiply(const Layer &layer, const Inputs &in, void *y, int dtype, int64_t begin, int64_t end) {
    constexpr int UNIT = BITS == 2 ? 16 : BITS == 3 ? 32 : 8, MIDDLE = 1 << (BITS - 1);
    const wr_header &h = *layer.h;
    for (int64_t t = begin; t < end; ++t)
        for (int64_t row = 0; row < in.rows; ++row) {
            float total[WR_TILE] = {};
            const uint16_t *unit = layer.tile(t);
            const float *x = in.values + row * layer.padded;
            for (int64_t g = 0; g < h.groups; ++g) {
                float sum[WR_TILE] = {};
                for (int64_t u = 0; u < layer.units; ++u, unit += layer.planes * 32, x += UNIT)
                    for (int k = 0; k < UNIT; ++k)
                        for (int n = 0; n < WR_TILE; ++n) sum[n] += x[k] * float(code_at<BITS>(unit, n, k) - MIDDLE);
                for (int n = 0; n < WR_TILE; ++n) {
                    int64_t at = (t * h.groups + g) * WR_TILE + n;
                    float zero = layer.zeros ? layer.zeros[at] * in.sums[row * h.groups + g] : 0;
                    total[n] += to_float(layer.scales[at]) * (sum[n] - zero);
                }
            }
            for (int n = 0; n < WR_TILE && t * WR_TILE + n < h.outputs; ++n)
                store(y, row * h.outputs + t * WR_TILE + n, total[n], dtype);
        }
}

template <int BITS>
void restore(const Layer &layer, void *w, int dtype, int64_t begin, int64_t end) {
    constexpr int UNIT = BITS == 2 ? 16 : BITS == 3 ? 32 : 8, MIDDLE = 1 << (BITS - 1);
    const wr_header &h = *layer.h;
    for (int64_t t = begin; t < end; ++t)
        for (int n = 0; n < WR_TILE && t * WR_TILE + n < h.outputs; ++n)
            for (int64_t k = 0; k < layer.padded; ++k) {
                int64_t column = layer.columns ? layer.columns[k] : k, at = (t * h.groups + k / h.width) * WR_TILE + n;
                if (column < 0) continue;
                const uint16_t *unit = layer.tile(t) + k / UNIT * layer.planes * 32;
                int steps = code_at<BITS>(unit, n, int(k % UNIT)) - MIDDLE - (layer.zeros ? layer.zeros[at] : 0);
                store(w, (t * WR_TILE + n) * h.inputs + column, float(steps) * to_float(layer.scales[at]), dtype);
            }
}

}  // namespace

const Kernels &portable() {
    static const Kernels table = {"portable",
                                  false,
                                  {multiply<2>, multiply<3>, multiply<4>, multiply<8>},
                                  {restore<2>, restore<3>, restore<4>, restore<8>},
                                  search,
                                  sweep};
    return table;
}

}  // namespace wr
