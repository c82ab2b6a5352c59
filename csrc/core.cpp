// The entry points: what is asked is checked here, inputs are made ready, and tiles are dealt out to threads.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "internal.h"

namespace {

using namespace wr;

int level = -1;

int best() {
#ifdef WR_HAS_AVX512
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bf16");
    if (wide) return WR_AVX512_BF16;
#endif
#ifdef WR_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return WR_AVX2;
#endif
#ifdef WR_HAS_NEON
    return WR_NEON;  // part of every AArch64
#endif
    return WR_PORTABLE;
}

const Kernels &kernels(int level) {
#ifdef WR_HAS_AVX512
    if (level == WR_AVX512_BF16) return avx512();
#endif
#ifdef WR_HAS_AVX2
    if (level == WR_AVX2) return avx2();
#endif
#ifdef WR_HAS_NEON
    if (level == WR_NEON) return neon();
#endif
    return portable();
}

const Kernels &kernels() {
    if (level < 0) level = best();
    return kernels(level);
}

// ---- threads: those of somebody else's OpenMP runtime, so that no second pool spins on the same cores ----

void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
int (*thread_number)();
int (*most_threads)();

constexpr int64_t BYTES_PER_THREAD = 64 * 1024;  // waking a thread costs as much as reading this

template <typename Work>
struct Team {
    const Work *work;
    int64_t count, threads;
    static void run(void *self) {
        auto team = static_cast<Team *>(self);
        int64_t me = thread_number();
        team->share(me);
    }
    void share(int64_t me) const { (*work)(count * me / threads, count * (me + 1) / threads); }
};

template <typename Work>
void deal_out(int64_t count, int64_t bytes, const Work &work) {
    int64_t threads = gomp_parallel ? most_threads() : 1;
    threads = std::min(threads, std::min(count, bytes / BYTES_PER_THREAD + 1));
    Team<Work> team{&work, count, threads};
    if (threads <= 1)
        work(0, count);
    else
        gomp_parallel(Team<Work>::run, &team, unsigned(threads), 0);
}

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

constexpr int64_t MOST = int64_t(1) << 40;  // numbers in an array: what is made of fewer is counted without overflow

// Whether an array of these sizes, none of them negative, can be.
bool fits(std::initializer_list<int64_t> sizes) {
    int64_t numbers = 1;
    for (int64_t size : sizes) {
        if (size > MOST / numbers) return false;
        numbers *= std::max<int64_t>(size, 1);
    }
    return true;
}

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

int wr_abi(void) { return WR_ABI; }

int wr_best(void) { return best(); }

int wr_use(int wanted) {
    level = std::max(0, std::min(wanted, best()));
    return level;
}

const char *wr_name(int wanted) { return wanted < 0 || wanted > best() ? nullptr : kernels(wanted).name; }

void wr_threads(void *parallel, void *number, void *most) {
    gomp_parallel = reinterpret_cast<decltype(gomp_parallel)>(parallel);
    thread_number = reinterpret_cast<decltype(thread_number)>(number);
    most_threads = reinterpret_cast<decltype(most_threads)>(most);
}

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

void wr_large_pages(void *memory, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t PAGE = 2 << 20;
    uintptr_t start = reinterpret_cast<uintptr_t>(memory), begin = (start + PAGE - 1) / PAGE * PAGE;
    uintptr_t end = bytes > 0 ? (start + uintptr_t(bytes)) / PAGE * PAGE : 0;
    if (memory && begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
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

int wr_search(const float *weight, const float *energy, int64_t rows, int64_t groups, int64_t width, int64_t bits,
              int symmetric, const float *shares, int64_t count, float *scales, float *zeros) {
    bool good = weight && energy && scales && zeros && (shares || !count) && rows > 0 && groups > 0 && width > 0;
    if (!good || count < 0 || count > 1 << 20 || bits < 2 || bits > 8 || !fits({rows, groups, width})) return -1;
    Search job{weight, energy, groups, width, bits, symmetric != 0, shares, count, scales, zeros};
    const Kernels &k = kernels();
    deal_out(rows, rows * groups * width * 4 * (count + 1), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(width);
        k.search(job, begin, end, scratch.data());
    });
    return 0;
}

int wr_sweep(const float *weight, float *target, const float *feedback, int64_t stride, const float *scales,
             const float *low, float most, float *steps, float *errors, int64_t columns, int64_t outputs) {
    bool good = weight && target && feedback && scales && low && steps && errors;
    if (!good || columns <= 0 || outputs <= 0 || stride < columns) return -1;
    if (!fits({columns, outputs}) || !fits({columns, stride})) return -1;
    Panel panel{weight, feedback, scales, low, target, steps, errors, most, columns, outputs, stride};
    const Kernels &k = kernels();
    deal_out(outputs, columns * columns * outputs * 2, [&](int64_t begin, int64_t end) { k.sweep(panel, begin, end); });
    return 0;
}

int wr_has_bfloat16(void) { return kernels().gram != nullptr; }

int wr_gram(const uint16_t *rows, int64_t count, int64_t stride, int64_t size, float *upper) {
    if (!rows || !upper || count < 0 || size <= 0 || stride < size) return -1;
    if (!fits({count, stride}) || !fits({size, size})) return -1;
    const GramKernel *k = kernels().gram;
    if (!k) return 1;
    constexpr int64_t GRAM_ROWS = 1024;  // what is packed of three panels then fits a core's second cache
    static thread_local std::vector<uint32_t> packed;
    int64_t panels = (size + WR_TILE - 1) / WR_TILE, units = k->units(size);
    packed.resize(panels * WR_TILE * ((std::min(count, GRAM_ROWS) + 1) / 2));
    for (int64_t from = 0; from < count; from += GRAM_ROWS) {
        int64_t now = std::min(GRAM_ROWS, count - from), pairs = (now + 1) / 2;
        Gram chunk{rows + from * stride, now, stride, size, pairs, packed.data(), upper};
        deal_out(panels, now * size * 2, [&](int64_t begin, int64_t end) { k->pack(chunk, begin, end); });
        deal_out(units, now * size * size, [&](int64_t begin, int64_t end) { k->add(chunk, begin, end); });
    }
    return 0;
}

int wr_attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint8_t *mask, uint16_t *out,
              int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t depth,
              const int64_t *s, float scale, int causal) {
    bool good = q && k && v && out && s && batch > 0 && heads > 0 && kv_heads > 0 && queries > 0 && keys > 0;
    if (!good || depth <= 0 || depth % 32 || heads % kv_heads) return -1;
    if (!fits({batch, heads, queries, depth}) || !fits({batch, kv_heads, keys, depth})) return -1;
    if (std::any_of(s, s + 11, [](int64_t stride) { return stride < 0 || stride > MOST; })) return -1;
    const AttentionKernel *kernel = kernels().attention;
    if (!kernel) return 1;
    if (causal) keys = std::min(keys, queries);  // nobody sees the rest
    Attention a{q, k, v, mask, out, heads, kv_heads, queries, keys, depth, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7],
                s[8], s[9], s[10], scale, causal != 0, nullptr};
    int64_t tiles = kernel->tiles(a), units = batch * heads * (tiles ? tiles : queries);
    double work = double(batch) * double(heads) * double(keys) * double(depth) * (tiles ? double(queries) / 8 : 4.0);
    int64_t bytes = int64_t(std::min(work, double(MOST)));
    if (tiles) {
        static thread_local std::vector<uint32_t> packed;
        packed.resize(batch * kv_heads * kernel->words(a));
        a.packed = packed.data();
        deal_out(batch * kv_heads, bytes, [&](int64_t begin, int64_t end) { kernel->pack(a, begin, end); });
    }
    deal_out(units, bytes, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<float> scratch;
        scratch.resize(kernel->scratch(a));
        (tiles ? kernel->many : kernel->few)(a, begin, end, scratch.data());
    });
    return 0;
}

}  // extern "C"
