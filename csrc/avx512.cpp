// AVX-512 with BF16: codes become bfloat16 whole numbers by one table lookup, and vdpbf16ps adds two products a lane.
//
// The lookup (vpermw) looks at the low 5 bits of a word only. A code of b bits is brought to the bottom by one shift;
// the bits above it belong to its neighbours, and do not matter because the table repeats itself every 2^b entries.
#include <immintrin.h>

#include "internal.h"
#include "solver.h"

namespace wr {
namespace {

inline __m512i table(int bits, int step, int offset) {  // entry i: step * (i mod 2^bits) + offset, as bfloat16
    alignas(64) uint16_t entries[32];
    for (int i = 0; i < 32; ++i) entries[i] = to_bfloat(float(step * (i & ((1 << bits) - 1)) + offset));
    return _mm512_load_si512(entries);
}

template <int BY>
inline __m512i shifted(__m512i words) {
    return BY ? _mm512_srli_epi16(words, BY) : words;
}

// The pair j of a unit: code minus 2^(bits-1) for 16 outputs and 2 inputs, as one or two summands.
template <int BITS>
struct Unit {
    static constexpr int PAIRS = BITS == 2 ? 8 : BITS == 3 ? 16 : 4, PLANES = BITS == 3 ? 3 : BITS == 8 ? 2 : 1;
    __m512i plane[PLANES];

    explicit Unit(const uint16_t *at) {
        for (int i = 0; i < PLANES; ++i) plane[i] = _mm512_loadu_si512(at + 32 * i);
    }
    template <int J>
    inline __m512i first(__m512i main) const {
        if constexpr (BITS == 3) {
            __m512i low = shifted<2 * (J & 7)>(plane[J >> 3]), top = _mm512_slli_epi16(shifted<J>(plane[2]), 2);
            // bits 0 and 1 of low, bit 2 of top; what is above bit 2 does not matter
            __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), low, top, 0xca);
            return _mm512_permutexvar_epi16(index, main);
        } else {
            return _mm512_permutexvar_epi16(shifted<(BITS == 2 ? 2 : 4) * J>(plane[0]), main);
        }
    }
    template <int J>
    inline __m512i second(__m512i rest) const {  // of 8 bits: the low four
        return _mm512_permutexvar_epi16(shifted<(4 * J) % 16>(plane[PLANES - 1]), rest);
    }
};

template <int BITS>
inline __m512i main_table() {
    return BITS == 8 ? table(4, 16, -128) : table(BITS, 1, -(1 << (BITS - 1)));
}

inline __m512bh as_bh(__m512i x) { return (__m512bh)x; }

inline void store_tile(void *y, int64_t at, __m512 values, int64_t count, int dtype) {
    __mmask16 mask = __mmask16(count >= WR_TILE ? 0xffff : (1 << count) - 1);
    if (dtype == WR_BFLOAT16)
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(y) + at, mask, (__m256i)_mm512_cvtneps_pbh(values));
    else
        _mm512_mask_storeu_ps(static_cast<float *>(y) + at, mask, values);
}

// ROWS rows at once, each with CHAINS independent sums: a sum may take a new summand only every few cycles.
template <int BITS, int ROWS, int CHAINS>
void tile_rows(const Layer &layer, const Inputs &in, int64_t t, int64_t row, __m512 *total) {
    const wr_header &h = *layer.h;
    const __m512i main = main_table<BITS>(), rest = table(4, 1, 0);
    const uint16_t *unit = layer.tile(t);
    const uint16_t *x = in.halves + row * in.stride;
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < h.groups; ++g) {
        __m512 sum[ROWS][CHAINS];
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < CHAINS; ++c) sum[r][c] = _mm512_setzero_ps();
        for (int64_t u = 0; u < layer.units; ++u, unit += Unit<BITS>::PLANES * 32, x += 2 * Unit<BITS>::PAIRS) {
            _mm_prefetch(reinterpret_cast<const char *>(unit) + 2048, _MM_HINT_T0);
            Unit<BITS> codes(unit);
            each<Unit<BITS>::PAIRS>([&](auto pair) {
                constexpr int j = pair;
                __m512i steps = codes.template first<j>(main), more = BITS == 8 ? codes.template second<j>(rest) : steps;
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    int two;
                    std::memcpy(&two, x + r * in.stride + 2 * j, 4);
                    __m512bh both = as_bh(_mm512_set1_epi32(two));
                    __m512 &to = sum[r][j % CHAINS];
                    to = _mm512_dpbf16_ps(to, as_bh(steps), both);
                    if (BITS == 8) to = _mm512_dpbf16_ps(to, as_bh(more), both);
                }
            });
        }
        int64_t at = (t * h.groups + g) * WR_TILE;
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(layer.scales + at)));
        for (int r = 0; r < ROWS; ++r) {
            __m512 all = sum[r][0];
            for (int c = 1; c < CHAINS; ++c) all = _mm512_add_ps(all, sum[r][c]);
            if (layer.zeros && (row + r) % in.pieces == 0) {
                __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(layer.zeros + at));
                __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
                all = _mm512_fnmadd_ps(zero, _mm512_set1_ps(in.sums[(row + r) / in.pieces * h.groups + g]), all);
            }
            total[r] = _mm512_fmadd_ps(scale, all, total[r]);
        }
    }
}

template <int BITS>
void multiply(const Layer &layer, const Inputs &in, void *y, int dtype, int64_t begin, int64_t end) {
    const wr_header &h = *layer.h;
    const int64_t most = in.pieces == 3 ? 6 : 8;
    for (int64_t t = begin; t < end; ++t)
        for (int64_t row = 0; row < in.rows; row += most) {
            __m512 total[8];
            int64_t count = in.rows - row < most ? in.rows - row : most;
            switch (count) {
                case 1: tile_rows<BITS, 1, 4>(layer, in, t, row, total); break;
                case 2: tile_rows<BITS, 2, 4>(layer, in, t, row, total); break;
                case 3: tile_rows<BITS, 3, 4>(layer, in, t, row, total); break;
                case 4: tile_rows<BITS, 4, 4>(layer, in, t, row, total); break;
                case 5: tile_rows<BITS, 5, 2>(layer, in, t, row, total); break;
                case 6: tile_rows<BITS, 6, 2>(layer, in, t, row, total); break;
                case 7: tile_rows<BITS, 7, 2>(layer, in, t, row, total); break;
                default: tile_rows<BITS, 8, 2>(layer, in, t, row, total);
            }
            for (int64_t r = 0; r < count; r += in.pieces) {
                __m512 sum = total[r + in.pieces - 1];
                for (int64_t piece = in.pieces - 2; piece >= 0; --piece) sum = _mm512_add_ps(sum, total[r + piece]);
                int64_t at = (row + r) / in.pieces * h.outputs + t * WR_TILE;
                store_tile(y, at, sum, h.outputs - t * WR_TILE, dtype);
            }
        }
}

// Four pairs of 16 outputs, transposed: output n's eight inputs side by side, 16 bytes of bfloat16.
inline void store_pairs(const __m512i *pairs, uint16_t *w, int64_t stride, int64_t rows) {
    __m512i a = _mm512_unpacklo_epi32(pairs[0], pairs[1]), b = _mm512_unpackhi_epi32(pairs[0], pairs[1]);
    __m512i c = _mm512_unpacklo_epi32(pairs[2], pairs[3]), d = _mm512_unpackhi_epi32(pairs[2], pairs[3]);
    __m512i out[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                      _mm512_unpackhi_epi64(b, d)};
    auto put = [&](int64_t n, __m128i inputs) {
        if (n < rows) _mm_storeu_si128(reinterpret_cast<__m128i *>(w + n * stride), inputs);
    };
    for (int i = 0; i < 4; ++i) {
        put(i, _mm512_castsi512_si128(out[i]));
        put(4 + i, _mm512_extracti32x4_epi32(out[i], 1));
        put(8 + i, _mm512_extracti32x4_epi32(out[i], 2));
        put(12 + i, _mm512_extracti32x4_epi32(out[i], 3));
    }
}

template <int BITS>
void restore(const Layer &layer, void *w, int dtype, int64_t begin, int64_t end) {
    if (dtype != WR_BFLOAT16 || layer.columns) return portable().restore[layer.kind()](layer, w, dtype, begin, end);
    const wr_header &h = *layer.h;
    const __m512i main = main_table<BITS>(), rest = table(4, 1, 0), odd = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t t = begin; t < end; ++t) {
        const uint16_t *unit = layer.tile(t);
        uint16_t *out = static_cast<uint16_t *>(w) + t * WR_TILE * h.inputs;
        int64_t rows = h.outputs - t * WR_TILE;
        for (int64_t g = 0; g < h.groups; ++g) {
            int64_t at = (t * h.groups + g) * WR_TILE;
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(layer.scales + at)));
            __m512 zero = _mm512_setzero_ps();
            if (layer.zeros) {
                __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(layer.zeros + at));
                zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            }
            auto scaled = [&](__m512i even, __m512i more) {  // the upper halves of 32-bit lanes, as float32
                __m512 steps = _mm512_sub_ps(_mm512_castsi512_ps(even), zero);
                if (BITS == 8) steps = _mm512_add_ps(steps, _mm512_castsi512_ps(more));
                return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(steps, scale)));
            };
            for (int64_t u = 0; u < layer.units; ++u, unit += Unit<BITS>::PLANES * 32) {
                Unit<BITS> codes(unit);
                __m512i pairs[Unit<BITS>::PAIRS];
                each<Unit<BITS>::PAIRS>([&](auto pair) {
                    constexpr int j = pair;
                    __m512i steps = codes.template first<j>(main), more = BITS == 8 ? codes.template second<j>(rest) : steps;
                    __m512i low = scaled(_mm512_slli_epi32(steps, 16), _mm512_slli_epi32(more, 16));
                    __m512i high = scaled(_mm512_and_si512(steps, odd), _mm512_and_si512(more, odd));
                    pairs[j] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                });
                for (int j = 0; j < Unit<BITS>::PAIRS; j += 4, out += 8) store_pairs(pairs + j, out, h.inputs, rows);
            }
        }
    }
}

}  // namespace

const Kernels &avx512() {
    static const Kernels table = {"avx512-bf16",
                                  true,
                                  {multiply<2>, multiply<3>, multiply<4>, multiply<8>},
                                  {restore<2>, restore<3>, restore<4>, restore<8>},
                                  search,
                                  sweep,
                                  &avx512_product,
                                  &avx512_attention};
    return table;
}

}  // namespace wr
