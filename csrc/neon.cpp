// ARMv8 with NEON: four outputs to a vector, codes as integers, sums in float32.
//
// A 32-bit lane holds codes of one output only. One AND leaves a single one of them where it stands, and the conversion
// to float32 takes it for a fixed-point number: dividing by 2^shift is part of that instruction.
#include <arm_neon.h>

#include "internal.h"
#include "solver.h"

namespace wr {
namespace {

// Four outputs of a unit, planes put together: codes stand FIELD bits apart. Of 3 and 8 bits, which need more room than
// a plane has, pairs of inputs alternate between two words, and a unit of 3 bits is done in two parts.
template <int BITS>
struct Part {
    static constexpr int WORDS = BITS == 3 || BITS == 8 ? 2 : 1, FIELD = BITS == 3 ? 4 : BITS;
    static constexpr int INPUTS = 32 / FIELD * WORDS, COUNT = BITS == 3 ? 2 : 1, PLANES = BITS == 3 ? 3 : WORDS;
    uint32x4_t word[WORDS];

    Part(const uint16_t *unit, int part, int quarter) {
        const uint16_t *at = unit + 8 * quarter;
        uint16x8_t first = vld1q_u16(at + 32 * part);
        if constexpr (BITS == 3) {
            uint16x8_t both = vld1q_u16(at + 64);
            // The square of a polynomial over GF(2) has the same bits, twice as far apart: as far as the low two are.
            poly8x8_t bits = vreinterpret_p8_u8(part ? vshrn_n_u16(both, 8) : vmovn_u16(both));
            uint16x8_t top = vreinterpretq_u16_p16(vmull_p8(bits, bits)), low = vdupq_n_u16(0x3333);
            word[0] = vreinterpretq_u32_u16(vbslq_u16(low, first, vshlq_n_u16(top, 2)));
            word[1] = vreinterpretq_u32_u16(vbslq_u16(low, vshrq_n_u16(first, 2), top));
        } else if constexpr (BITS == 8) {
            uint8x16_t top = vreinterpretq_u8_u16(first), low = vreinterpretq_u8_u16(vld1q_u16(at + 32));
            word[0] = vreinterpretq_u32_u8(vsliq_n_u8(low, top, 4));
            word[1] = vreinterpretq_u32_u8(vsriq_n_u8(top, low, 4));
        } else {
            word[0] = vreinterpretq_u32_u16(first);
        }
    }
    template <int K>
    inline float32x4_t code() const {
        constexpr int pair = K >> 1, shift = 16 * (K & 1) + FIELD * (pair / WORDS);
        uint32x4_t alone = vandq_u32(word[pair % WORDS], vdupq_n_u32(((1u << BITS) - 1) << shift));
        if constexpr (shift == 0)
            return vcvtq_f32_u32(alone);
        else
            return vcvtq_n_f32_u32(alone, shift);
    }
};

// ROWS rows at once, so that a code is taken out once for all of them, each with CHAINS independent sums.
template <int BITS, int ROWS, int CHAINS>
void tile_rows(const Layer &layer, const Inputs &in, int64_t t, int64_t row, float32x4_t (*total)[4]) {
    using P = Part<BITS>;
    constexpr int MIDDLE = 1 << (BITS - 1);
    const wr_header &h = *layer.h;
    const uint16_t *unit = layer.tile(t);
    const float *x = in.values + row * layer.padded;
    for (int r = 0; r < ROWS; ++r)
        for (int q = 0; q < 4; ++q) total[r][q] = vdupq_n_f32(0);
    for (int64_t g = 0; g < h.groups; ++g) {
        float32x4_t sum[ROWS][CHAINS][4];
        for (auto &chains : sum)
            for (auto &chain : chains)
                for (auto &four : chain) four = vdupq_n_f32(0);
        for (int64_t u = 0; u < layer.units; ++u, unit += P::PLANES * 32)
            for (int part = 0; part < P::COUNT; ++part, x += P::INPUTS) {
                P quarters[4] = {{unit, part, 0}, {unit, part, 1}, {unit, part, 2}, {unit, part, 3}};
                float32x4_t values[ROWS];
                each<P::INPUTS>([&](auto place) {
                    constexpr int k = place;
                    if (k % 4 == 0)
                        for (int r = 0; r < ROWS; ++r) values[r] = vld1q_f32(x + r * layer.padded + k);
#pragma GCC unroll 4
                    for (int q = 0; q < 4; ++q) {
                        float32x4_t code = quarters[q].template code<k>();
#pragma GCC unroll 4
                        for (int r = 0; r < ROWS; ++r) {
                            float32x4_t &to = sum[r][k % CHAINS][q];
                            to = vfmaq_laneq_f32(to, code, values[r], k % 4);
                        }
                    }
                });
            }
        int64_t at = (t * h.groups + g) * WR_TILE;
        for (int q = 0; q < 4; ++q) {
            float32x4_t zero = vdupq_n_f32(MIDDLE);
            if (layer.zeros) {
                int32_t bytes;
                std::memcpy(&bytes, layer.zeros + at + 4 * q, 4);
                int16x8_t wider = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
                zero = vaddq_f32(zero, vcvtq_f32_s32(vmovl_s16(vget_low_s16(wider))));
            }
            float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(layer.scales + at + 4 * q)));
            for (int r = 0; r < ROWS; ++r) {
                float32x4_t steps = sum[r][0][q];
                for (int c = 1; c < CHAINS; ++c) steps = vaddq_f32(steps, sum[r][c][q]);
                steps = vfmsq_n_f32(steps, zero, in.sums[(row + r) * h.groups + g]);
                total[r][q] = vfmaq_f32(total[r][q], scale, steps);
            }
        }
    }
}

template <int BITS>
void multiply(const Layer &layer, const Inputs &in, void *y, int dtype, int64_t begin, int64_t end) {
    const wr_header &h = *layer.h;
    for (int64_t t = begin; t < end; ++t)
        for (int64_t row = 0; row < in.rows; row += 4) {
            float32x4_t total[4][4];
            int64_t count = in.rows - row < 4 ? in.rows - row : 4;
            switch (count) {
                case 1: tile_rows<BITS, 1, 2>(layer, in, t, row, total); break;
                case 2: tile_rows<BITS, 2, 2>(layer, in, t, row, total); break;
                case 3: tile_rows<BITS, 3, 1>(layer, in, t, row, total); break;
                default: tile_rows<BITS, 4, 1>(layer, in, t, row, total);
            }
            for (int64_t r = 0; r < count; ++r) {
                float out[WR_TILE];
                for (int q = 0; q < 4; ++q) vst1q_f32(out + 4 * q, total[r][q]);
                for (int n = 0; n < WR_TILE && t * WR_TILE + n < h.outputs; ++n)
                    store(y, (row + r) * h.outputs + t * WR_TILE + n, out[n], dtype);
            }
        }
}

}  // namespace

const Kernels &neon() {
    const Restore(&plain)[4] = portable().restore;
    static const Kernels table = {"neon",
                                  false,
                                  {multiply<2>, multiply<3>, multiply<4>, multiply<8>},
                                  {plain[0], plain[1], plain[2], plain[3]},
                                  search,
                                  sweep};
    return table;
}

}  // namespace wr
