// Products with N:M sparse weights: of each M neighbouring weights of an output, the N of largest magnitude are used.
//
// Tokens lie across lanes, so every kept weight is one broadcast and runs of multiply-adds over contiguous tokens. A strip of 64
// tokens goes through blocks of at most 64 inputs: the block's inputs stay in the nearest cache while all outputs read them.
#pragma once
#include <algorithm>
#include "scratch.h"

namespace {

struct NM {
    static constexpr int64_t STRIP = 64, INPUTS = 64, OUTPUTS = 16, LANES = COLUMNS * W < STRIP ? COLUMNS * W : STRIP;

    const SfNM &c;
    int64_t inputs = 0, blocks = 0, kept = 0, outputs = 0;  // of a block; in all; kept weights of an output in a block; padded
    Buffer<float> weight;                                   // [blocks, outputs, kept]
    Buffer<uint16_t> place;                                 // the same: offset of its input's row in a strip's block

    struct Desk {
        Buffer<float> in, out, lines;  // [INPUTS, STRIP], [outputs, STRIP], [16, 16]
    };

    // How many of M magnitudes rank before each; of equal ones the first. NaN is the smallest. `size` has room for whole vectors.
    void rank(const float *size, int32_t *before) const {
        for (int64_t first = 0; first < c.m; first += W) {
            const vf own = load(size + first);
            vi found = {}, lane = {};
            for (int i = 0; i < W; i++) lane[i] = (int32_t)first + i;
            for (int32_t j = 0; j < (int32_t)c.m; j++) {
                const vf other = set1(size[j]);
                const vi later = lane > j, sooner = lane < j;
                found -= (vi)(other >= own) & later;
                found -= ~(vi)(own >= other) & sooner;
            }
            memcpy(before + first, &found, sizeof found);
        }
    }
    // The N largest of M weights, `step` items apart, and where their inputs lie.
    void choose(const float *w, int64_t step, int64_t row, float *to, uint16_t *at) const {
        float size[INPUTS] = {};
        int32_t before[INPUTS];
        for (int64_t i = 0; i < c.m; i++) size[i] = w[i * step] < 0 ? -w[i * step] : w[i * step];
        rank(size, before);
        int64_t found = 0;
        for (int64_t i = 0; i < c.m && found < c.n; i++) {
            to[found] = w[i * step];
            at[found] = (uint16_t)((row + i) * STRIP);
            found += before[i] < c.n;
        }
        for (; found < c.n; found++) to[found] = 0, at[found] = (uint16_t)(row * STRIP);  // where there are NaN
    }
    void pack(int64_t block, int64_t output) const {
        const int64_t first = block * inputs, many = least(inputs, c.K - first);
        float *to = weight + (block * outputs + output) * kept;
        uint16_t *at = place + (block * outputs + output) * kept;
        for (int64_t i = 0, e = 0; i < many; i += c.m, e += c.n) {
            if (output < c.O) choose(c.w + output * c.w_out + (first + i) * c.w_in, c.w_in, i, to + e, at + e);
            else for (int64_t j = e; j < e + c.n; j++) to[j] = 0, at[j] = 0;
        }
    }

    // `in` [many, STRIP] from n rows of x; zeros behind the last token.
    void turn(int64_t token, int64_t n, int64_t first, int64_t many, Desk &desk) const {
        for (int64_t t = 0; t < STRIP; t += 16)
            for (int64_t i = 0; i < many; i += 16) {
                const int64_t rows = most<int64_t>(0, least<int64_t>(16, n - t)), items = least<int64_t>(16, many - i);
                const float *from = c.x + (token + t) * c.x_row + first + i;
                if (rows == 16 && items == 16) {
                    transpose16(from, c.x_row, desk.in + i * STRIP + t, STRIP);
                    continue;
                }
                memset(desk.lines.p, 0, 256 * sizeof(float));
                for (int64_t r = 0; r < rows; r++) memcpy(desk.lines + 16 * r, from + r * c.x_row, items * sizeof(float));
                transpose16(desk.lines.p, 16, desk.in + i * STRIP + t, STRIP);
            }
    }
    void turn_back(int64_t token, int64_t n, int64_t first, int64_t many, Desk &desk) const {
        for (int64_t t = 0; t < n; t += 16)
            for (int64_t o = 0; o < many; o += 16) {
                const int64_t rows = least<int64_t>(16, n - t), items = least<int64_t>(16, many - o);
                const float *from = desk.out + o * STRIP + t;
                float *to = c.y + (token + t) * c.O + first + o;
                if (rows == 16 && items == 16) {
                    transpose16(from, STRIP, to, c.O);
                    continue;
                }
                transpose16(from, STRIP, desk.lines.p, 16);
                for (int64_t r = 0; r < rows; r++) memcpy(to + r * c.O, desk.lines + 16 * r, items * sizeof(float));
            }
    }

    // Two outputs, LANES tokens: out += weights x inputs.
    void two(int64_t count, const float *w, const uint16_t *at, const float *in, float *out) const {
        vf a[COLUMNS], b[COLUMNS];
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) a[v] = load(out + v * W), b[v] = load(out + STRIP + v * W);
        for (int64_t e = 0; e < count; e++) {
            const vf x = set1(w[e]), y = set1(w[kept + e]);
            const float *p = in + at[e], *q = in + at[kept + e];
#pragma GCC unroll 4
            for (int v = 0; v < COLUMNS; v++) a[v] += x * load(p + v * W), b[v] += y * load(q + v * W);
        }
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) store(out + v * W, a[v]), store(out + STRIP + v * W, b[v]);
    }

    void strip(int64_t token, int64_t first, int64_t many, Desk &desk) const {
        const int64_t n = least(STRIP, c.T - token);
        memset(desk.out.p, 0, many * STRIP * sizeof(float));
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t rows = least(inputs, c.K - block * inputs), count = rows / c.m * c.n;
            turn(token, n, block * inputs, rows, desk);
            for (int64_t o = 0; o < many; o += 2) {
                const int64_t from = (block * outputs + first + o) * kept;
                for (int64_t t = 0; t < n; t += LANES)
                    two(count, weight + from, place + from, desk.in + t, desk.out + o * STRIP + t);
            }
        }
        turn_back(token, n, first, least(many, c.O - first), desk);
    }

    int run(SfParallel parallel) {
        inputs = INPUTS / c.m * c.m;
        blocks = (c.K + inputs - 1) / inputs;
        kept = inputs / c.m * c.n;
        outputs = round_up(c.O, OUTPUTS);
        if (!weight.make(blocks * outputs * kept) || !place.make(blocks * outputs * kept)) return 1;
        auto packing = [&](int64_t i, int) {
            for (int64_t o = 0; o < OUTPUTS; o++) pack(i % blocks, i / blocks * OUTPUTS + o);
        };
        in_parallel(parallel, c.threads, blocks * (outputs / OUTPUTS), packing);
        // with few strips, the outputs are shared out too
        const int64_t strips = (c.T + STRIP - 1) / STRIP, groups = outputs / OUTPUTS;
        const int64_t parts = least(groups, (4 * c.threads + strips - 1) / strips), each = (groups + parts - 1) / parts * OUTPUTS;
        Rooms<Desk> desks;
        bool ok = desks.make(c.threads, [&](Desk &desk) {
            return desk.in.make(round_up(inputs, 16) * STRIP) && desk.out.make(each * STRIP) && desk.lines.make(256);
        });
        if (!ok) return 1;
        auto task = [&](int64_t i, int thread) {
            const int64_t first = i % parts * each;
            if (first < outputs) strip(i / parts * STRIP, first, least(each, outputs - first), desks[thread]);
        };
        in_parallel(parallel, c.threads, strips * parts, task);
        return 0;
    }
};

inline int nm(const SfNM &c, SfParallel parallel) { return NM{c}.run(parallel); }

}  // namespace
