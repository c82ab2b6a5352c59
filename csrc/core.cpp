// Which instruction set is in use, whose threads, and the entry points of the solver and of products of activations.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

#include "team.h"

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

const Kernels &kernels_of(int level) {
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

// wr_product, or with `upper` and one side twice wr_gram.
int add_product(Columns left, Columns right, int64_t count, float *total, bool upper) {
    auto good = [&](const Columns &c) {
        return (c.rows || !count) && c.size > 0 && c.stride >= c.size && fits({count, c.stride});
    };
    if (!total || count < 0 || !good(left) || !good(right) || !fits({left.size, right.size})) return -1;
    const ProductKernel *k = kernels().product;
    if (!k) return 1;
    constexpr int64_t ROWS = 1024;  // what is packed of 176 columns then fits a core's second cache
    static thread_local std::vector<uint32_t> packed;
    auto panels = [](const Columns &c) { return (c.size + WR_TILE - 1) / WR_TILE; };
    int64_t words = (std::min(count, ROWS) + 1) / 2 * WR_TILE, others = upper ? 0 : panels(left) * words;
    packed.resize(panels(right) * words + others);
    left.packed = packed.data();
    right.packed = left.packed + others;
    for (int64_t from = 0; from < count; from += ROWS) {
        int64_t now = std::min(ROWS, count - from);
        auto pack = [&](Columns c) {
            c.rows += from * c.stride;
            deal_out(panels(c), now * c.size * 2, [&](int64_t begin, int64_t end) { k->pack(c, now, begin, end); });
        };
        if (!upper) pack(left);
        pack(right);
        Product chunk{left, right, (now + 1) / 2, total, upper};
        deal_out(k->units(chunk), now * left.size * right.size,
                 [&](int64_t begin, int64_t end) { k->add(chunk, begin, end); });
    }
    return 0;
}

}  // namespace

namespace wr {

const Kernels &kernels() {
    if (level < 0) level = best();
    return kernels_of(level);
}

void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
int (*thread_number)();
int (*most_threads)();

}  // namespace wr

extern "C" {

int wr_abi(void) { return WR_ABI; }

int wr_best(void) { return best(); }

int wr_use(int wanted) {
    level = std::max(0, std::min(wanted, best()));
    return level;
}

const char *wr_name(int wanted) { return wanted < 0 || wanted > best() ? nullptr : kernels_of(wanted).name; }

void wr_threads(void *parallel, void *number, void *most) {
    gomp_parallel = reinterpret_cast<decltype(gomp_parallel)>(parallel);
    thread_number = reinterpret_cast<decltype(thread_number)>(number);
    most_threads = reinterpret_cast<decltype(most_threads)>(most);
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

int wr_has_bfloat16(void) { return kernels().product != nullptr; }

int wr_gram(const uint16_t *rows, int64_t count, int64_t stride, int64_t size, float *upper) {
    Columns side{rows, stride, size, nullptr};
    return add_product(side, side, count, upper, true);
}

int wr_product(const uint16_t *a, int64_t a_stride, int64_t m, const uint16_t *b, int64_t b_stride, int64_t n,
               int64_t count, float *total) {
    return add_product({a, a_stride, m, nullptr}, {b, b_stride, n, nullptr}, count, total, false);
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
