// Packed layers: laid out, packed, multiplied by and restored. What is asked is checked here, inputs are made ready.
#include <cmath>
#include <vector>

#include "team.h"

namespace {

using namespace wr;

// ---- inputs ----

struct Scratch {
    std::vector<float> values, sums;
    std::vector<uint16_t> halves;
};

void take_row(const Layer &layer, const void *x, int64_t row, int dtype, float *to) {
    int64_t inputs = layer.h->inputs;
    for (int64_t k = 0; k < layer.padded; ++k) {
        int64_t from = layer.columns ? layer.columns[k] : k;
        if (from < 0)
            to[k] = 0;
        else if (dtype == WR_BFLOAT16)
            to[k] = from_bfloat(static_cast<const uint16_t *>(x)[row * inputs + from]);
        else
            to[k] = static_cast<const float *>(x)[row * inputs + from];
    }
}

// A float32 as three bfloat16 whose sum it is: 8 + 8 + 8 bits.
void split(const float *from, int64_t count, uint16_t *to, int64_t stride) {
    for (int64_t k = 0; k < count; ++k) {
        float rest = from[k];
        for (int piece = 0; piece < 3; ++piece) {
            uint16_t part = to_bfloat(rest);
            to[piece * stride + k] = part;
            rest = std::isfinite(from_bfloat(part)) ? rest - from_bfloat(part) : 0;
        }
    }
}

Inputs ready(const Layer &layer, const void *x, int64_t rows, int dtype, const Kernels &k, Scratch &scratch) {
    bool as_they_are = k.wants_halves && dtype == WR_BFLOAT16 && !layer.columns && !layer.zeros;
    Inputs in{rows, 1, nullptr, nullptr, layer.padded, nullptr};
    if (as_they_are) {
        in.halves = static_cast<const uint16_t *>(x);
        return in;
    }
    scratch.values.resize(rows * layer.padded);
    scratch.sums.resize(rows * layer.h->groups);
    for (int64_t row = 0; row < rows; ++row) {
        float *values = scratch.values.data() + row * layer.padded;
        take_row(layer, x, row, dtype, values);
        for (int64_t g = 0; g < layer.h->groups; ++g) {
            float sum = 0;
            for (int64_t i = 0; i < layer.h->width; ++i) sum += values[g * layer.h->width + i];
            scratch.sums[row * layer.h->groups + g] = sum;
        }
    }
    in.sums = scratch.sums.data();
    in.values = scratch.values.data();
    if (!k.wants_halves) return in;
    in.pieces = dtype == WR_BFLOAT16 ? 1 : 3;
    in.rows = rows * in.pieces;
    scratch.halves.resize(in.rows * layer.padded);
    for (int64_t row = 0; row < rows; ++row) {
        uint16_t *to = scratch.halves.data() + row * in.pieces * layer.padded;
        const float *from = in.values + row * layer.padded;
        if (in.pieces == 3)
            split(from, layer.padded, to, layer.padded);
        else
            for (int64_t i = 0; i < layer.padded; ++i) to[i] = to_bfloat(from[i]);
    }
    in.halves = scratch.halves.data();
    return in;
}

int64_t aligned(int64_t bytes) { return (bytes + WR_ALIGNMENT - 1) / WR_ALIGNMENT * WR_ALIGNMENT; }

bool sane(int64_t outputs, int64_t inputs, int64_t bits, int64_t groups, int64_t width) {
    bool known = bits == 2 || bits == 3 || bits == 4 || bits == 8;
    bool positive = outputs > 0 && inputs > 0 && inputs <= INT32_MAX && groups > 0 && groups <= inputs;
    return known && positive && width > 0 && width <= inputs && fits({outputs, groups, width}) && groups * width >= inputs;
}

wr_header lay_out(int64_t outputs, int64_t inputs, int64_t bits, int64_t groups, int64_t width, bool has_zeros,
                  bool has_columns) {
    wr_header h = {};
    int64_t unit = Layer::unit_of(bits), tiles = (outputs + WR_TILE - 1) / WR_TILE;
    h.magic = WR_MAGIC, h.outputs = outputs, h.inputs = inputs, h.bits = bits, h.groups = groups;
    h.width = (width + unit - 1) / unit * unit;
    h.scales = sizeof(wr_header);
    int64_t at = aligned(h.scales + tiles * groups * WR_TILE * 2);
    if (has_zeros) h.zeros = at, at = aligned(at + tiles * groups * WR_TILE);
    if (has_columns) h.columns = at, at = aligned(at + groups * h.width * 4);
    h.codes = at;
    h.bytes = at + tiles * groups * (h.width / unit) * Layer::planes_of(bits) * 64;
    return h;
}

bool placed(const void *block) { return block && reinterpret_cast<uintptr_t>(block) % 8 == 0; }

// Whether its header is what wr_pack writes for some layer.
bool usable(const void *block) {
    auto h = static_cast<const wr_header *>(block);
    if (!placed(block) || h->magic != WR_MAGIC) return false;
    if (!sane(h->outputs, h->inputs, h->bits, h->groups, std::min(h->width, h->inputs))) return false;
    if (h->width > h->inputs + 31) return false;  // padded by less than the largest unit
    wr_header whole = lay_out(h->outputs, h->inputs, h->bits, h->groups, h->width, h->zeros, h->columns);
    return (h->columns || h->groups * h->width == h->inputs) && !std::memcmp(h, &whole, sizeof whole);
}

void put(uint16_t *unit, int64_t bits, int n, int64_t k, int code) {
    int64_t word = 2 * n + (k & 1), j = k >> 1;
    if (bits == 4) {
        unit[word] |= uint16_t(code << (4 * j));
    } else if (bits == 2) {
        unit[word] |= uint16_t(code << (2 * j));
    } else if (bits == 8) {
        unit[word] |= uint16_t((code >> 4) << (4 * j));
        unit[32 + word] |= uint16_t((code & 15) << (4 * j));
    } else {
        unit[32 * (j >> 3) + word] |= uint16_t((code & 3) << (2 * (j & 7)));
        unit[64 + word] |= uint16_t((code >> 2) << j);
    }
}

}  // namespace

extern "C" {

int64_t wr_bytes(int64_t outputs, int64_t inputs, int64_t bits, int64_t groups, int64_t width, int has_zeros,
                 int has_columns) {
    if (!sane(outputs, inputs, bits, groups, width)) return 0;
    wr_header h = lay_out(outputs, inputs, bits, groups, width, has_zeros, true);
    bool in_order = !has_columns && h.groups * h.width == inputs;
    return lay_out(outputs, inputs, bits, groups, width, has_zeros, !in_order).bytes;
}

int wr_pack(void *block, int64_t outputs, int64_t inputs, int64_t bits, int64_t groups, int64_t width,
            const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const int32_t *group) {
    if (!placed(block) || !codes || !scales || !sane(outputs, inputs, bits, groups, width)) return -1;
    wr_header h = lay_out(outputs, inputs, bits, groups, width, zeros, true);
    bool in_order = !group && h.groups * h.width == inputs;
    h = lay_out(outputs, inputs, bits, groups, width, zeros, !in_order);
    std::vector<int32_t> columns(h.groups * h.width, -1), filled(groups, 0);
    for (int64_t k = 0; k < inputs; ++k) {
        int64_t g = group ? group[k] : k / width;
        if (g < 0 || g >= groups || filled[g] >= width) return -1;
        columns[g * h.width + filled[g]++] = int32_t(k);
    }
    std::memset(block, 0, h.bytes);
    std::memcpy(block, &h, sizeof h);
    auto base = static_cast<char *>(block);
    if (h.columns) std::memcpy(base + h.columns, columns.data(), columns.size() * 4);
    Layer layer(block);
    auto pack = [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            auto tile = const_cast<uint16_t *>(layer.tile(t));
            for (int n = 0; n < WR_TILE && t * WR_TILE + n < outputs; ++n) {
                int64_t row = t * WR_TILE + n;
                for (int64_t g = 0; g < groups; ++g) {
                    int64_t at = (t * groups + g) * WR_TILE + n;
                    const_cast<uint16_t *>(layer.scales)[at] = scales[row * groups + g];
                    if (zeros) const_cast<int8_t *>(layer.zeros)[at] = int8_t(zeros[row * groups + g] - (1 << (bits - 1)));
                }
                for (int64_t k = 0; k < layer.padded; ++k) {
                    int32_t from = columns[k];
                    if (from < 0) continue;
                    put(tile + k / layer.unit * layer.planes * 32, bits, n, k % layer.unit, codes[row * inputs + from]);
                }
            }
        }
    };
    deal_out(layer.tiles, h.bytes, pack);
    return 0;
}

int wr_matmul(const void *block, const void *x, void *y, int64_t rows, int dtype) {
    if (!usable(block) || !x || !y || rows < 0 || (dtype != WR_FLOAT32 && dtype != WR_BFLOAT16)) return -1;
    static thread_local Scratch scratch;
    Layer layer(block);
    if (!fits({rows, layer.padded}) || !fits({rows, layer.h->outputs})) return -1;
    const Kernels &k = kernels();
    Inputs in = ready(layer, x, rows, dtype, k, scratch);
    deal_out(layer.tiles, layer.h->bytes,
             [&](int64_t begin, int64_t end) { k.multiply[layer.kind()](layer, in, y, dtype, begin, end); });
    return 0;
}

int wr_restore(const void *block, void *w, int dtype, int64_t begin, int64_t end) {
    if (!usable(block) || !w || (dtype != WR_FLOAT32 && dtype != WR_BFLOAT16)) return -1;
    Layer layer(block);
    bool whole = end == layer.h->outputs || end % WR_TILE == 0;
    if (begin < 0 || begin % WR_TILE || begin >= end || end > layer.h->outputs || !whole) return -1;
    const Kernels &k = kernels();
    int64_t first = begin / WR_TILE, count = (end - begin + WR_TILE - 1) / WR_TILE;
    // Kernels write where an output stands in the whole weight.
    auto start = static_cast<char *>(w) - begin * layer.h->inputs * (dtype == WR_BFLOAT16 ? 2 : 4);
    deal_out(count, layer.h->bytes / layer.tiles * count,
             [&](int64_t from, int64_t to) { k.restore[layer.kind()](layer, start, dtype, first + from, first + to); });
    return 0;
}

}  // extern "C"
