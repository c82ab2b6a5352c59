// softmax(Q K^T) V in bfloat16, with scores and sums in float32. Several queries are worked on in tiles over packed keys
// and values (Dao et al., "FlashAttention", 2022: the running maximum and sum of each row); a few, as in decoding, stream
// the keys and values as they lie.
#include <cmath>

#include "avx512_tile.h"

namespace wr {
namespace {

constexpr int ROWS = 6, PANELS = 4;              // 24 sums, 4 vectors and a pair fit the registers
constexpr int64_t QUERIES = 48, KEYS = 128;      // of a tile: scores, weights, keys and values fit a core's caches
constexpr float LOG2E = 1.4426950408889634f;

// 2^x for x <= 0, within 2^-22 of it.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160), x);  // 0 from here on; in this order NaN stays NaN
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, whole);
    const float terms[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};
    __m512 y = _mm512_set1_ps(terms[0]);
    for (int i = 1; i < 7; ++i) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(y, whole);
}

// Which of 16 keys from `key` on a query may look at.
inline __mmask16 seen(const Attention &a, int64_t batch, int64_t query, int64_t key, int64_t end) {
    __mmask16 lanes = first_lanes((a.causal && query + 1 < end ? query + 1 : end) - key);
    if (!a.mask || !lanes) return lanes;
    const uint8_t *at = a.mask + batch * a.mask_batch + query * a.mask_row + key;
    __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(end - key), at);
    return lanes & _mm_test_epi8_mask(bytes, bytes);
}

// ---- many queries ----

int64_t key_panels(const Attention &a) { return (a.keys + 15) / 16; }
int64_t head_words(const Attention &a) { return (key_panels(a) * 16) * a.depth; }  // of packed keys and values

// Keys: panels of 16 keys, pairs along the depth. Values: panels of 16 numbers of the depth, pairs along the keys.
void pack(const Attention &a, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
        const uint16_t *k = a.k + head / a.kv_heads * a.k_batch + head % a.kv_heads * a.k_head;
        const uint16_t *v = a.v + head / a.kv_heads * a.v_batch + head % a.kv_heads * a.v_head;
        uint32_t *to = a.packed + head * head_words(a);
        for (int64_t panel = 0; panel < key_panels(a); ++panel)
            for (int64_t t = 0; t < a.depth / 2; ++t)
                for (int64_t lane = 0; lane < 16; ++lane) {
                    uint32_t pair = 0;
                    if (panel * 16 + lane < a.keys) std::memcpy(&pair, k + (panel * 16 + lane) * a.k_row + 2 * t, 4);
                    *to++ = pair;
                }
        int64_t pairs = key_panels(a) * 8;
        std::memset(to, 0, pairs * a.depth * 4);
        for (int64_t panel = 0; panel < a.depth / 16; ++panel)
            pack_rows(v + panel * 16, a.keys, a.v_row, 0xffff, to + panel * pairs * 16);
    }
}

struct Tile {
    alignas(64) float scores[QUERIES][KEYS];
    alignas(64) uint16_t weights[QUERIES][KEYS];
    float most[QUERIES], sum[QUERIES], fade[QUERIES];
};

// scores[0 .. ROWS-1][16 * p ..] for PANELS panels of keys.
template <int COUNT>
inline void scores_of(const Attention &a, const uint16_t *q, const uint32_t *keys, float (*scores)[KEYS], int64_t column) {
    __m512 sum[ROWS][COUNT];
    tile<ROWS, COUNT>(reinterpret_cast<const uint32_t *>(q), a.depth / 2, 1, keys, a.depth / 2, a.depth / 2, sum);
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < COUNT; ++p) _mm512_store_ps(&scores[r][column + 16 * p], sum[r][p]);
}

// out[0 .. ROWS-1][16 * p ..] = out * fade + weights times values, `pairs` pairs of keys.
template <int COUNT>
inline void add_values(const Tile &tile_, int64_t row, const uint32_t *values, int64_t apart, int64_t pairs, float *out,
                       int64_t depth) {
    __m512 sum[ROWS][COUNT];
    auto left = reinterpret_cast<const uint32_t *>(tile_.weights[row]);
    tile<ROWS, COUNT>(left, KEYS / 2, 1, values, apart, pairs, sum);
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < COUNT; ++p) {
            float *at = out + r * depth + 16 * p;
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_set1_ps(tile_.fade[row + r]), sum[r][p]));
        }
}

template <typename Body>
inline void by_panels(int64_t count, const Body &body) {  // body(first, how many): four at once, then the rest
    int64_t p = 0;
    for (; p + PANELS <= count; p += PANELS) body(p, std::integral_constant<int, PANELS>());
    if (count - p == 3) body(p, std::integral_constant<int, 3>());
    if (count - p == 2) body(p, std::integral_constant<int, 2>());
    if (count - p == 1) body(p, std::integral_constant<int, 1>());
}

// Scores become weights 2^(score - most); the row's maximum and sum move on, `fade` is what the old ones are worth now.
void soften(const Attention &a, Tile &t, int64_t row, int64_t batch, int64_t query, int64_t key, int64_t width) {
    const __m512 scale = _mm512_set1_ps(a.scale * LOG2E);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t k = 0; k < width; k += 16) {
        __mmask16 lanes = seen(a, batch, query, key + k, a.keys);
        __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), lanes, _mm512_load_ps(&t.scores[row][k]), scale);
        _mm512_store_ps(&t.scores[row][k], score);
        most = _mm512_max_ps(most, score);
    }
    float now = std::fmax(t.most[row], _mm512_reduce_max_ps(most));
    float base = now == -INFINITY ? 0 : now;  // a row that sees nothing yet: every weight 2^-inf
    __m512 sum = _mm512_setzero_ps(), level = _mm512_set1_ps(base);
    for (int64_t k = 0; k < width; k += 16) {
        __m512 score = _mm512_load_ps(&t.scores[row][k]);
        __mmask16 lanes = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m512 weight = _mm512_maskz_mov_ps(lanes, exp2_of(_mm512_sub_ps(score, level)));
        sum = _mm512_add_ps(sum, weight);
        _mm256_store_si256(reinterpret_cast<__m256i *>(&t.weights[row][k]), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    t.fade[row] = t.most[row] == -INFINITY ? 0 : std::exp2(t.most[row] - base);
    t.most[row] = now;
    t.sum[row] = t.sum[row] * t.fade[row] + _mm512_reduce_add_ps(sum);
}

inline void store_row(const Attention &a, const float *row, float sum, uint16_t *out) {
    __m512 share = _mm512_set1_ps(sum > 0 ? 1 / sum : sum == sum ? 0 : sum);  // seeing nothing gives zeros, NaN stays
    for (int64_t d = 0; d < a.depth; d += 16) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(row + d), share);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + d), (__m256i)_mm512_cvtneps_pbh(value));
    }
}

// One tile of QUERIES queries of one head; units count through batches, heads and tiles.
void many(const Attention &a, int64_t begin, int64_t end, float *scratch) {
    int64_t tiles = (a.queries + QUERIES - 1) / QUERIES, pairs = key_panels(a) * 8;
    auto out = scratch;                                                         // [QUERIES][depth]
    auto q = reinterpret_cast<uint16_t *>(scratch + QUERIES * a.depth);         // the same, bfloat16, missing rows zero
    static thread_local Tile t;
    for (int64_t unit = begin; unit < end; ++unit) {
        int64_t first = unit % tiles * QUERIES, head = unit / tiles % a.heads, batch = unit / tiles / a.heads;
        int64_t rows = a.queries - first < QUERIES ? a.queries - first : QUERIES;
        const uint32_t *keys = a.packed + (batch * a.kv_heads + head / (a.heads / a.kv_heads)) * head_words(a);
        const uint32_t *values = keys + head_words(a) / 2;
        std::memset(scratch, 0, QUERIES * a.depth * 6);
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(q + r * a.depth, a.q + batch * a.q_batch + head * a.q_head + (first + r) * a.q_row, a.depth * 2);
        for (int64_t r = 0; r < QUERIES; ++r) t.most[r] = -INFINITY, t.sum[r] = 0, t.fade[r] = 0;
        int64_t last = a.causal && first + rows < a.keys ? first + rows : a.keys;
        for (int64_t key = 0; key < last; key += KEYS) {
            int64_t panels = ((last - key < KEYS ? last - key : KEYS) + 15) / 16, whole = (rows + ROWS - 1) / ROWS * ROWS;
            for (int64_t r = 0; r < whole; r += ROWS)
                by_panels(panels, [&](int64_t p, auto count) {
                    const uint32_t *from = keys + (key / 16 + p) * a.depth * 8;
                    scores_of<decltype(count)::value>(a, q + r * a.depth, from, &t.scores[r], 16 * p);
                });
            for (int64_t r = 0; r < rows; ++r) soften(a, t, r, batch, first + r, key, panels * 16);
            for (int64_t r = 0; r < whole; r += ROWS)
                by_panels(a.depth / 16, [&](int64_t p, auto count) {
                    const uint32_t *from = values + (p * pairs + key / 2) * 16;
                    add_values<decltype(count)::value>(t, r, from, pairs, panels * 8, out + r * a.depth + 16 * p, a.depth);
                });
        }
        for (int64_t r = 0; r < rows; ++r)
            store_row(a, out + r * a.depth, t.sum[r], a.out + ((batch * a.queries + first + r) * a.heads + head) * a.depth);
    }
}

// ---- few queries ----

// out[16 * p ..] = the sum of the values by their weights; what no query sees has weight 0 and may hold anything.
template <int COUNT>
void weigh(const float *weights, const uint16_t *v, int64_t stride, int64_t keys, float *out) {
    __m512 sum[COUNT];
    for (int p = 0; p < COUNT; ++p) sum[p] = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; ++key) {
        if (weights[key] == 0) continue;
        __m512 weight = _mm512_set1_ps(weights[key]);
        for (int p = 0; p < COUNT; ++p) {
            __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(v + key * stride + 16 * p));
            __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            sum[p] = _mm512_fmadd_ps(weight, value, sum[p]);
        }
    }
    for (int p = 0; p < COUNT; ++p) _mm512_storeu_ps(out + 16 * p, sum[p]);
}

// Units count through batches, heads and queries; `scratch` holds a weight for every key and the sum over the values.
void few(const Attention &a, int64_t begin, int64_t end, float *scratch) {
    float *weights = scratch, *out = scratch + key_panels(a) * 16;
    for (int64_t unit = begin; unit < end; ++unit) {
        int64_t query = unit % a.queries, head = unit / a.queries % a.heads, batch = unit / a.queries / a.heads;
        int64_t source = head / (a.heads / a.kv_heads);
        const uint16_t *q = a.q + batch * a.q_batch + head * a.q_head + query * a.q_row;
        const uint16_t *k = a.k + batch * a.k_batch + source * a.k_head, *v = a.v + batch * a.v_batch + source * a.v_head;
        float most = -INFINITY, sum = 0;
        for (int64_t key = 0; key < a.keys; key += 16) {
            __mmask16 lanes = seen(a, batch, query, key, a.keys);
            for (int64_t l = 0; l < 16; ++l) {
                if (!(lanes >> l & 1)) {
                    weights[key + l] = -INFINITY;
                    continue;
                }
                __m512 product = _mm512_setzero_ps();
                for (int64_t d = 0; d < a.depth; d += 32) {
                    __m512i x = _mm512_loadu_si512(q + d), y = _mm512_loadu_si512(k + (key + l) * a.k_row + d);
                    product = _mm512_dpbf16_ps(product, (__m512bh)x, (__m512bh)y);
                }
                weights[key + l] = _mm512_reduce_add_ps(product) * (a.scale * LOG2E);
            }
            __m512 these = _mm512_loadu_ps(weights + key);
            most = std::fmax(most, _mm512_reduce_max_ps(these));
        }
        for (int64_t key = 0; key < a.keys; key += 16) {
            __m512 these = _mm512_loadu_ps(weights + key);
            __mmask16 lanes = _mm512_cmp_ps_mask(these, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
            these = _mm512_maskz_mov_ps(lanes, exp2_of(_mm512_sub_ps(these, _mm512_set1_ps(most))));
            _mm512_storeu_ps(weights + key, these);
            sum += _mm512_reduce_add_ps(these);
        }
        by_panels(a.depth / 16, [&](int64_t panel, auto count) {
            weigh<decltype(count)::value>(weights, v + 16 * panel, a.v_row, a.keys, out + 16 * panel);
        });
        store_row(a, out, sum, a.out + ((batch * a.queries + query) * a.heads + head) * a.depth);
    }
}

int64_t tiles(const Attention &a) { return a.queries < ROWS ? 0 : (a.queries + QUERIES - 1) / QUERIES; }
int64_t words(const Attention &a) { return head_words(a); }
int64_t scratch(const Attention &a) {
    return tiles(a) ? QUERIES * a.depth * 3 / 2 : key_panels(a) * 16 + a.depth;
}

}  // namespace

const AttentionKernel avx512_attention = {tiles, words, scratch, pack, many, few};

}  // namespace wr
