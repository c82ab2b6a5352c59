// AVX2 with FMA and F16C: eight outputs to a vector, codes as integers, sums in float32.
#include <immintrin.h>

#include "internal.h"
#include "solver.h"

namespace wr {
namespace {

// Codes of outputs 8 half .. 8 half + 7 at place k of a unit, as float32.
template <int BITS>
inline __m256 codes(const uint16_t *unit, int half, int k) {
    auto load = [&](int plane) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(unit + 32 * plane + 16 * half));
    };
    int shift = 16 * (k & 1), j = k >> 1;
    auto take = [&](int plane, int bit, int mask) {  // a 32-bit lane holds both parities of one output
        return _mm256_and_si256(_mm256_srl_epi32(load(plane), _mm_cvtsi32_si128(shift + bit)), _mm256_set1_epi32(mask));
    };
    __m256i code;
    if (BITS == 4)
        code = take(0, 4 * j, 15);
    else if (BITS == 2)
        code = take(0, 2 * j, 3);
    else if (BITS == 8)
        code = _mm256_add_epi32(_mm256_slli_epi32(take(0, 4 * j, 15), 4), take(1, 4 * j, 15));
    else
        code = _mm256_add_epi32(take(j >> 3, 2 * (j & 7), 3), _mm256_slli_epi32(take(2, j, 1), 2));
    return _mm256_cvtepi32_ps(code);
}

template <int BITS>
void multiply(const Layer &layer, const Inputs &in, void *y, int dtype, int64_t begin, int64_t end) {
    constexpr int UNIT = BITS == 2 ? 16 : BITS == 3 ? 32 : 8, MIDDLE = 1 << (BITS - 1);
    const wr_header &h = *layer.h;
    for (int64_t t = begin; t < end; ++t)
        for (int64_t row = 0; row < in.rows; ++row) {
            const uint16_t *unit = layer.tile(t);
            const float *x = in.values + row * layer.padded;
            __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int64_t g = 0; g < h.groups; ++g) {
                __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
                for (int64_t u = 0; u < layer.units; ++u, unit += layer.planes * 32, x += UNIT)
                    for (int k = 0; k < UNIT; ++k) {
                        __m256 value = _mm256_set1_ps(x[k]);
                        for (int half = 0; half < 2; ++half) {
                            __m256 &to = sum[2 * (k & 1) + half];
                            to = _mm256_fmadd_ps(codes<BITS>(unit, half, k), value, to);
                        }
                    }
                float offset = in.sums[row * h.groups + g];
                for (int half = 0; half < 2; ++half) {
                    int64_t at = (t * h.groups + g) * WR_TILE + 8 * half;
                    __m256 zero = _mm256_set1_ps(MIDDLE);
                    if (layer.zeros) {
                        __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(layer.zeros + at));
                        zero = _mm256_add_ps(zero, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
                    }
                    __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(layer.scales + at)));
                    __m256 steps = _mm256_fnmadd_ps(zero, _mm256_set1_ps(offset), _mm256_add_ps(sum[half], sum[2 + half]));
                    total[half] = _mm256_fmadd_ps(scale, steps, total[half]);
                }
            }
            float out[WR_TILE];
            _mm256_storeu_ps(out, total[0]);
            _mm256_storeu_ps(out + 8, total[1]);
            for (int n = 0; n < WR_TILE && t * WR_TILE + n < h.outputs; ++n)
                store(y, row * h.outputs + t * WR_TILE + n, out[n], dtype);
        }
}

}  // namespace

const Kernels &avx2() {
    const Restore(&plain)[4] = portable().restore;
    static const Kernels table = {"avx2",
                                  false,
                                  {multiply<2>, multiply<3>, multiply<4>, multiply<8>},
                                  {plain[0], plain[1], plain[2], plain[3]},
                                  search,
                                  sweep};
    return table;
}

}  // namespace wr
