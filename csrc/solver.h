// The solver's two inner loops, included into every instruction set's own file: plain C++ that a compiler turns into
// vectors of whatever width that file is compiled for. Each call works on its own rows or outputs only, so how they
// are dealt out to threads does not change a bit of the result.
#pragma once
#include <cmath>
#include <initializer_list>

#include "internal.h"

namespace wr {
namespace {

constexpr int LANES = 16;

inline __attribute__((always_inline)) float rounded(float value, float low, float high) {
    value = __builtin_rintf(value);  // ties to even, as torch.round
    value = value < low ? low : value;
    return value > high ? high : value;
}

// sum(weighted * steps) and sum(energy * steps^2) for the steps that this scale leads to.
inline void judge(const float *weight, const float *weighted, const float *energy, int64_t width, float inverse,
                  float low, float high, float *along, float *norm) {
    float a[LANES] = {}, n[LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int l = 0; l < LANES; ++l) {
            float step = rounded(weight[k + l] * inverse, low, high);
            a[l] += weighted[k + l] * step;
            n[l] += energy[k + l] * (step * step);
        }
    for (; k < width; ++k) {
        float step = rounded(weight[k] * inverse, low, high);
        a[0] += weighted[k] * step;
        n[0] += energy[k] * (step * step);
    }
    *along = 0, *norm = 0;
    for (int l = 0; l < LANES; ++l) *along += a[l], *norm += n[l];
}

// A scale as a float16 file gives it back, zero moved to the smallest magnitude of the same sign.
inline float storable(float scale) {
    constexpr float TINY = 0x1p-24f, LARGEST = 65504;
    if (std::fabs(scale) < TINY) scale = scale < 0 ? -TINY : TINY;
    if (scale > 2 * LARGEST) scale = 2 * LARGEST;
    if (scale < -2 * LARGEST) scale = -2 * LARGEST;
    return to_float(to_half(scale));
}

struct Best {
    float gain = -1, scale = INFINITY, zero = 0;  // a group that no candidate fits keeps the infinite scale
};

// `weighted` is scratch for one group.
inline void search(const Search &s, int64_t begin, int64_t end, float *weighted) {
    const float most = float((1 << s.bits) - 1), middle = float(1 << (s.bits - 1));
    for (int64_t at = begin * s.groups; at < end * s.groups; ++at) {
        const float *weight = s.weight + at * s.width, *energy = s.energy + at % s.groups * s.width;
        float largest = 0, lowest = 0, highest = 0;
        for (int64_t k = 0; k < s.width; ++k) {
            weighted[k] = weight[k] * energy[k];
            if (std::fabs(weight[k]) > std::fabs(largest)) largest = weight[k];
            lowest = weight[k] < lowest ? weight[k] : lowest;
            highest = weight[k] > highest ? weight[k] : highest;
        }
        Best best;
        auto consider = [&](float scale, float zero) {
            scale = storable(scale);
            float along, norm;
            judge(weight, weighted, energy, s.width, 1 / scale, -zero, most - zero, &along, &norm);
            float floor = norm > 1e-30f ? norm : 1e-30f, gain = along * along / floor;
            if (gain > best.gain) best = {gain, norm > 0 ? along / floor : scale, zero};
        };
        if (s.symmetric) {
            float base = -largest / middle;
            consider(base, middle);
            for (int64_t i = 0; i < s.count; ++i) consider(base * s.shares[i], middle), consider(base * -s.shares[i], middle);
        } else {
            float span = (highest - lowest) / most;
            for (int64_t i = 0; i < s.count; ++i) {
                float scale = span == 0 ? 0x1p-24f : span * s.shares[i], centre = -lowest * s.shares[i] / scale;
                for (float zero : {std::floor(centre), std::ceil(centre)})
                    consider(scale, zero < 0 ? 0 : zero > most ? most : zero);
            }
        }
        s.scales[at] = storable(best.scale);
        s.zeros[at] = best.zero;
    }
}

// One panel of the column sweep for outputs begin .. end-1: round a column, take its error, let the later columns of
// the panel make up for it.
inline void sweep(const Panel &p, int64_t begin, int64_t end) {
    constexpr int64_t CHUNK = 4 * LANES;
    for (int64_t from = begin; from < end; from += CHUNK) {
        int64_t count = end - from < CHUNK ? end - from : CHUNK;
        for (int64_t j = 0; j < p.columns; ++j) {
            const float *weight = p.weight + j * p.outputs + from, *scale = p.scales + j * p.outputs + from;
            const float *low = p.low + j * p.outputs + from;
            float *target = p.target + j * p.outputs + from, *step = p.steps + j * p.outputs + from;
            float *error = p.errors + j * p.outputs + from;
            for (int64_t n = 0; n < count; ++n) {
                step[n] = rounded(target[n] / scale[n], low[n], low[n] + p.most);
                error[n] = weight[n] - step[n] * scale[n];
            }
            for (int64_t i = j + 1; i < p.columns; ++i) {
                float share = p.feedback[j * p.stride + i];
                float *later = p.target + i * p.outputs + from;
                for (int64_t n = 0; n < count; ++n) later[n] += share * error[n];
            }
        }
    }
}

}  // namespace
}  // namespace wr
