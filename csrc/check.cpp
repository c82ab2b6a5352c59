// A program that drives the core through random layers and nonsense, for a build that stops at the first misuse of
// memory (`make sanitize`) and for a machine that is emulated (`make neon`). What the core computes is compared with a
// product of its own restored weight in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "wellrounded.h"

namespace {

std::mt19937 random_bits(1);
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

struct Block {  // 64-byte aligned, and not a byte longer than asked for
    char *memory;
    explicit Block(int64_t bytes) : memory(static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {}
    ~Block() { std::free(memory); }
};

void fail(const char *what) {
    std::printf("failed: %s\n", what);
    std::exit(1);
}

double number(uint16_t half) {  // bfloat16
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void one_layer() {
    static const int64_t widths[] = {2, 3, 4, 8};
    int64_t bits = widths[between(0, 3)], outputs = between(1, 70), inputs = between(1, 300);
    int64_t width = between(1, inputs), groups = (inputs + width - 1) / width;
    bool has_zeros = between(0, 1), has_groups = between(0, 1);
    std::vector<uint8_t> codes(outputs * inputs), zeros(outputs * groups);
    std::vector<uint16_t> scales(outputs * groups);
    std::vector<int32_t> group(inputs);
    for (auto &code : codes) code = uint8_t(between(0, (1 << bits) - 1));
    for (auto &zero : zeros) zero = uint8_t(between(0, (1 << bits) - 1));
    for (auto &scale : scales) scale = uint16_t(between(0, 1) * 0x8000 + between(0x1000, 0x3c00));
    for (int64_t k = 0; k < inputs; ++k) group[k] = int32_t(k / width);
    for (int64_t k = inputs - 1; k > 0; --k) std::swap(group[k], group[between(0, k)]);
    int64_t bytes = wr_bytes(outputs, inputs, bits, groups, width, has_zeros, has_groups);
    if (bytes <= 0) fail("wr_bytes of a good layer");
    Block block(bytes);
    if (wr_pack(block.memory, outputs, inputs, bits, groups, width, codes.data(), scales.data(),
                has_zeros ? zeros.data() : nullptr, has_groups ? group.data() : nullptr))
        fail("wr_pack of a good layer");
    int64_t rows = between(0, 19);
    std::vector<float> x(rows * inputs), y(rows * outputs), w(outputs * inputs);
    std::vector<uint16_t> half_x(rows * inputs, 0x3f80), half_y(rows * outputs), half_w(outputs * inputs);
    for (auto &value : x) value = float(between(-1000, 1000)) / 256;
    if (wr_restore(block.memory, w.data(), WR_FLOAT32, 0, outputs)) fail("wr_restore");
    if (wr_restore(block.memory, half_w.data(), WR_BFLOAT16, 0, outputs)) fail("wr_restore to bfloat16");
    if (rows && wr_matmul(block.memory, x.data(), y.data(), rows, WR_FLOAT32)) fail("wr_matmul");
    if (rows && wr_matmul(block.memory, half_x.data(), half_y.data(), rows, WR_BFLOAT16)) fail("wr_matmul of bfloat16");
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < outputs; ++n) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < inputs; ++k) {
                double part = double(x[row * inputs + k]) * w[n * inputs + k];
                sum += part, size += std::abs(part);
            }
            if (has_zeros) size *= 1 << bits;  // codes and their zero point are summed apart
            if (std::abs(y[row * outputs + n] - sum) > 1e-5 * size + 1e-6) fail("a product");
        }
}

void one_search_and_panel() {
    int64_t bits = between(2, 8), rows = between(1, 40), groups = between(1, 5), width = between(1, 140);
    std::vector<float> weight(rows * groups * width), energy(groups * width), scales(rows * groups), zeros(rows * groups);
    for (auto &value : weight) value = float(between(-1000, 1000)) / 1024;
    for (auto &value : energy) value = float(between(0, 1000)) / 500;
    const float shares[] = {1.0f, 0.8f, 0.6f, 0.4f};
    if (wr_search(weight.data(), energy.data(), rows, groups, width, bits, int(between(0, 1)), shares, between(0, 4),
                  scales.data(), zeros.data()))
        fail("wr_search");
    int64_t columns = between(1, 40), outputs = between(1, 200), stride = columns + between(0, 3);
    std::vector<float> w(columns * outputs, 0.3f), target(w), feedback(columns * stride, 0.01f), scale(w.size(), 0.1f);
    std::vector<float> low(w.size(), -8), steps(w.size()), errors(w.size());
    if (wr_sweep(w.data(), target.data(), feedback.data(), stride, scale.data(), low.data(), 15, steps.data(),
                 errors.data(), columns, outputs))
        fail("wr_sweep");
    for (float step : steps)
        if (step < -8 || step > 7) fail("a step outside its grid");
    if (wr_sweep(w.data(), target.data(), feedback.data(), columns - 1, scale.data(), low.data(), 15, steps.data(),
                 errors.data(), columns, outputs) != -1)
        fail("a stride too short was taken");
}

struct Rows {  // of bfloat16, perhaps apart, and not a number longer than they have to be
    int64_t count, size, stride;
    std::vector<uint16_t> values;
    explicit Rows(int64_t count)
        : count(count), size(between(1, between(0, 3) ? 130 : 400)), stride(size + between(0, 1) * between(0, 40)),
          values(count ? (count - 1) * stride + size : 0) {
        for (auto &value : values) value = uint16_t(between(0, 1) * 0x8000 + between(0x3c00, 0x4080));
    }
    double at(int64_t row, int64_t column) const { return number(values[row * stride + column]); }
};

// Whether `found` is `before` plus the sum of what columns i of a and j of b multiply to.
bool is_product(const Rows &a, int64_t i, const Rows &b, int64_t j, double before, double found) {
    double sum = before, magnitude = std::abs(before);
    for (int64_t t = 0; t < a.count; ++t) {
        double part = a.at(t, i) * b.at(t, j);
        sum += part, magnitude += std::abs(part);
    }
    return std::abs(found - sum) <= 1e-6 * double(a.count + 2) * magnitude;
}

void one_product() {
    int64_t count = between(0, 9) ? between(0, 70) : between(1000, 2100);
    Rows a(count), b(count);
    int64_t m = a.size, n = b.size, i = between(0, m - 1), j = between(0, n - 1), k = between(i, m - 1);
    std::vector<float> total(m * n, -2.5f), upper(m * m, -2.5f);
    int done = wr_product(a.values.data(), a.stride, m, b.values.data(), b.stride, n, count, total.data());
    if (done != (wr_has_bfloat16() ? 0 : 1)) fail("wr_product");
    if (!done && !is_product(a, i, b, j, -2.5, total[i * n + j])) fail("a product of rows");
    if (wr_gram(a.values.data(), count, a.stride, m, upper.data()) != done) fail("wr_gram");
    if (!done && !is_product(a, i, a, k, -2.5, upper[i * m + k])) fail("a second moment");
    if (wr_gram(a.values.data(), count, m - 1, m, upper.data()) != -1) fail("rows that overlap were taken");
    if (wr_product(a.values.data(), m - 1, m, b.values.data(), b.stride, n, count, total.data()) != -1)
        fail("a left side whose rows overlap was taken");
    if (wr_product(a.values.data(), a.stride, m, b.values.data(), n - 1, n, count, total.data()) != -1)
        fail("a right side whose rows overlap was taken");
}

void one_attention() {
    int64_t batch = between(1, 2), kv_heads = between(1, 3), heads = kv_heads * between(1, 3), depth = 32 * between(1, 5);
    int64_t queries = between(0, 1) ? between(1, 5) : between(6, 110), keys = between(1, 150);
    bool causal = between(0, 1), masked = between(0, 1);
    std::vector<uint16_t> q(batch * heads * queries * depth), k(batch * kv_heads * keys * depth), v(k.size()), out(q.size());
    std::vector<uint8_t> mask(batch * queries * keys);
    for (auto *values : {&q, &k, &v})
        for (auto &value : *values) value = uint16_t(between(0, 1) * 0x8000 + between(0x3e00, 0x3f80));
    for (auto &byte : mask) byte = uint8_t(between(0, 2));
    const int64_t strides[] = {heads * queries * depth, queries * depth, depth, kv_heads * keys * depth, keys * depth, depth,
                               kv_heads * keys * depth, keys * depth, depth, queries * keys, keys};
    int done = wr_attend(q.data(), k.data(), v.data(), masked ? mask.data() : nullptr, out.data(), batch, heads, kv_heads,
                         queries, keys, depth, strides, 0.1f, causal);
    if (done != 0 && done != 1) fail("wr_attend");
    int64_t b = between(0, batch - 1), h = between(0, heads - 1), i = between(0, queries - 1), d = between(0, depth - 1);
    int64_t source = (b * kv_heads + h / (heads / kv_heads)) * keys;
    double sum = 0, value = 0, size = 0;
    for (int64_t j = 0; j < keys; ++j) {
        if ((causal && j > i) || (masked && !mask[(b * queries + i) * keys + j])) continue;
        double score = 0;
        for (int64_t at = 0; at < depth; ++at)
            score += number(q[((b * heads + h) * queries + i) * depth + at]) * number(k[(source + j) * depth + at]);
        double weight = std::exp(0.1 * score);
        sum += weight, value += weight * number(v[(source + j) * depth + d]);
        size += weight * std::abs(number(v[(source + j) * depth + d]));
    }
    double exact = sum ? value / sum : 0, found = number(out[((b * queries + i) * heads + h) * depth + d]);
    if (!done && std::abs(found - exact) > 0.008 * (sum ? size / sum : 0)) fail("an attention");  // 2^-8 twice, and a little
}

void nonsense() {
    int64_t number[5];
    for (auto &n : number) n = between(-3, 40) * (between(0, 9) ? 1 : between(1, 1000));
    int64_t bytes = wr_bytes(number[0], number[1], number[2], number[3], number[4], 0, 0);
    if (bytes < 0) fail("a negative size");
    std::vector<char> zeros(256, 0);
    float y[16];
    if (wr_matmul(zeros.data(), y, y, 1, WR_FLOAT32) != -1) fail("a block of zeros was taken");
    if (wr_restore(zeros.data(), y, WR_FLOAT32, 0, 1) != -1) fail("a block of zeros was restored");
    if (wr_pack(zeros.data(), number[0], number[1], 5, number[3], number[4], nullptr, nullptr, nullptr, nullptr) != -1)
        fail("nothing was packed");
}

}  // namespace

int main() {
    for (int level = WR_PORTABLE; level <= wr_best(); ++level) {
        wr_use(level);
        for (int i = 0; i < 300; ++i) one_layer(), one_search_and_panel(), one_product(), one_attention(), nonsense();
        std::printf("%s: 300 layers\n", wr_name(level));
    }
}
