// What the instruction sets share: a view of a packed layer, jobs cut along the outputs, and conversions.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "wellrounded.h"

// Every instruction set is a translation unit with flags of its own. An inline function that the linker shares between
// them could be the copy that a lesser machine cannot run: so each unit inlines its own, or keeps it to itself.
#if defined(_MSC_VER)
#define WR_OWN __forceinline
#else
#define WR_OWN inline __attribute__((always_inline))
#endif

namespace wr {

struct Layer {
    const wr_header *h;
    const uint16_t *scales;   // [tile][group][16]
    const int8_t *zeros;      // the same, or null
    const int32_t *columns;   // [padded], or null
    const uint16_t *codes;
    int64_t tiles, padded, unit, planes, units;  // inputs and vectors of a unit, units of a group

    WR_OWN explicit Layer(const void *block) : h(static_cast<const wr_header *>(block)) {
        auto base = static_cast<const char *>(block);
        scales = reinterpret_cast<const uint16_t *>(base + h->scales);
        zeros = h->zeros ? reinterpret_cast<const int8_t *>(base + h->zeros) : nullptr;
        columns = h->columns ? reinterpret_cast<const int32_t *>(base + h->columns) : nullptr;
        codes = reinterpret_cast<const uint16_t *>(base + h->codes);
        tiles = (h->outputs + WR_TILE - 1) / WR_TILE;
        padded = h->groups * h->width;
        unit = unit_of(h->bits);
        planes = planes_of(h->bits);
        units = h->width / unit;
    }
    WR_OWN const uint16_t *tile(int64_t t) const { return codes + t * h->groups * units * planes * 32; }
    WR_OWN int64_t kind() const { return h->bits == 8 ? 3 : h->bits - 2; }  // among 2, 3, 4, 8
    static WR_OWN int64_t unit_of(int64_t bits) { return bits == 2 ? 16 : bits == 3 ? 32 : 8; }
    static WR_OWN int64_t planes_of(int64_t bits) { return bits == 3 ? 3 : bits == 8 ? 2 : 1; }
};

// Rows of inputs ready to be multiplied by: in the layer's own order, padding filled with zeros.
struct Inputs {
    int64_t rows;             // as the kernel sees them: float32 rows may be three bfloat16 rows each
    int64_t pieces;           // how many of them make one row
    const float *values;      // [rows][padded], or null where `halves` is used
    const uint16_t *halves;   // [rows][stride] bfloat16, or null
    int64_t stride;
    const float *sums;        // [rows / pieces][groups] of each group's inputs, or null where no kernel asks
};

// The search for scales and zeros, as wr_search describes it.
struct Search {
    const float *weight, *energy;
    int64_t groups, width, bits;
    bool symmetric;
    const float *shares;
    int64_t count;
    float *scales, *zeros;
};

// One panel of the column sweep, as wr_sweep describes it.
struct Panel {
    const float *weight, *feedback, *scales, *low;
    float *target, *steps, *errors, most;
    int64_t columns, outputs, stride;
};

// One side of a product that sums over rows, a chunk at a time; `packed` holds [panel of 16 columns][pair of rows][16].
struct Columns {
    const uint16_t *rows;  // bfloat16 [count][stride], of which the first `size` of a row count
    int64_t stride, size;
    uint32_t *packed;
};
struct Product {
    Columns left, right;
    int64_t pairs;  // of rows that are packed
    float *total;   // [left.size][right.size] += left^T right
    bool upper;     // of a side with itself: only what is not below the diagonal
};
struct ProductKernel {
    void (*pack)(const Columns &, int64_t count, int64_t begin, int64_t end);  // panels
    void (*add)(const Product &, int64_t begin, int64_t end);                  // units
    int64_t (*units)(const Product &);
};

// Queries, keys and values of all heads, as wr_attend describes them; `packed` is room for words() per batch and kv head.
struct Attention {
    const uint16_t *q, *k, *v;
    const uint8_t *mask;  // or null
    uint16_t *out;
    int64_t heads, kv_heads, queries, keys, depth;
    int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_row;
    float scale;
    bool causal;
    uint32_t *packed;
};
struct AttentionKernel {
    int64_t (*tiles)(const Attention &);    // of a head's queries; 0 if they are so few that nothing is packed
    int64_t (*words)(const Attention &);
    int64_t (*scratch)(const Attention &);  // floats
    void (*pack)(const Attention &, int64_t begin, int64_t end);  // batches times kv heads
    void (*many)(const Attention &, int64_t begin, int64_t end, float *scratch);  // batches times heads times tiles
    void (*few)(const Attention &, int64_t begin, int64_t end, float *scratch);   // batches times heads times queries
};

using Multiply = void (*)(const Layer &, const Inputs &, void *y, int dtype, int64_t begin, int64_t end);
using Restore = void (*)(const Layer &, void *w, int dtype, int64_t begin, int64_t end);

// One instruction set: layers are worked on tile by tile, begin .. end-1, the solver row by row. What depends on the
// number of bits stands once for each, in the order 2, 3, 4, 8.
struct Kernels {
    const char *name;
    bool wants_halves;
    Multiply multiply[4];
    Restore restore[4];
    void (*search)(const Search &, int64_t begin, int64_t end, float *scratch);
    void (*sweep)(const Panel &, int64_t begin, int64_t end);
    // These two multiply bfloat16 with bfloat16: null where there is no such product.
    const ProductKernel *product = nullptr;
    const AttentionKernel *attention = nullptr;
};
const Kernels &portable();
const Kernels &avx2();
const Kernels &avx512();
const Kernels &neon();
extern const ProductKernel avx512_product;
extern const AttentionKernel avx512_attention;

// body(0), body(1), ... with numbers that are constants, as shifts and lanes have to be.
template <typename Body, int... J>
WR_OWN void each(const Body &body, std::integer_sequence<int, J...>) {
    (body(std::integral_constant<int, J>()), ...);
}
template <int COUNT, typename Body>
WR_OWN void each(const Body &body) {
    each(body, std::make_integer_sequence<int, COUNT>());
}

static inline float to_float(uint16_t half) {  // IEEE float16
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | (fraction << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        float small = float(fraction) * 0x1p-24f;
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_half(float value) {  // to nearest, ties to even; beyond 65504 infinite
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) {  // below the smallest normal float16: whole multiples of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &rest, 4);
        return uint16_t(sign | uint32_t(__builtin_rintf(magnitude * 0x1p24f)));
    }
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}

static inline float from_bfloat(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bfloat(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 64);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void store(void *to, int64_t index, float value, int dtype) {
    if (dtype == WR_BFLOAT16)
        static_cast<uint16_t *>(to)[index] = to_bfloat(value);
    else
        static_cast<float *>(to)[index] = value;
}

// The code of output n at place k of a unit.
template <int BITS>
static inline int code_at(const uint16_t *unit, int n, int k) {
    int word = 2 * n + (k & 1), j = k >> 1;
    if (BITS == 4) return (unit[word] >> (4 * j)) & 15;
    if (BITS == 8) return ((unit[word] >> (4 * j)) & 15) * 16 + ((unit[32 + word] >> (4 * j)) & 15);
    if (BITS == 2) return (unit[word] >> (2 * j)) & 3;
    int low = (unit[32 * (j >> 3) + word] >> (2 * (j & 7))) & 3;
    return low + 4 * ((unit[64 + word] >> j) & 1);
}

}  // namespace wr
