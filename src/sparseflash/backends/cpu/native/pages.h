// Scores of pages of keys by the rows that summarise each page, and the best pages of every query, in one pass.
#pragma once
#include "best.h"

namespace {

struct Pages {
    static constexpr int64_t SUM = 1;  // value of `share`: queries of a group are added before the product

    const SfPages &c;
    const bool in_bf16 = c.dtype == SF_BF16 && c.rows.lane == 1 && c.w % (2 * W) == 0;  // rows that are read in place
    const bool in_place = in_bf16 || (c.dtype == SF_F32 && c.rows.lane == 1);
    int64_t group = c.Hq / c.Hkv, made = c.share == SUM ? 1 : group;  // queries multiplied with each row
    int64_t told = c.share ? 1 : group, heads = c.Hkv * told;         // heads per KV head, and in all, that pages are scored for
    struct Desk {
        Buffer<float> weights, lines, score;
        Buffer<uint8_t> among;
        Best best;
    };

    static vf dot(const float *a, const float *b, int64_t n) {
        vf x = {}, y = {};
        int64_t d = 0;
        for (; d + 2 * W <= n; d += 2 * W) {
            x += load(a + d) * load(b + d);
            y += load(a + d + W) * load(b + d + W);
        }
        if (d + W <= n) x += load(a + d) * load(b + d), d += W;
        if (d < n) y += load_first(a + d, n - d) * load_first(b + d, n - d);
        return x + y;
    }
    // dot of a bf16 row with weights whose even and odd places are separated (`apart`): a 32-bit lane holds two bf16 items.
    static vf dot(const bf *a, const float *b, int64_t n) {
        vf x = {}, y = {};
        for (int64_t d = 0; d < n; d += 2 * W) {
            vi both;
            memcpy(&both, a + d, sizeof both);
            x += (vf)(both << 16) * load(b + d);
            y += (vf)(both & (vi){} + (int32_t)0xffff0000u) * load(b + d + W);
        }
        return x + y;
    }
    static void apart(float *b, int64_t n) {
        float own[2 * W];
        for (int64_t d = 0; d < n; d += 2 * W) {
            for (int i = 0; i < W; i++) own[i] = b[d + 2 * i], own[W + i] = b[d + 2 * i + 1];
            memcpy(b + d, own, sizeof own);
        }
    }
    static float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN is the largest

    const float *weights(int64_t b, int64_t h, int64_t t, Desk &desk) const {
        for (int64_t g = 0; g < group; g++) {
            const float *from = c.q + ((b * c.Hq + h * group + g) * c.Tq + t) * c.w;
            float *to = desk.weights + g % made * c.w;
            if (g < made) memcpy(to, from, c.w * sizeof(float));
            else for (int64_t d = 0; d < c.w; d++) to[d] += from[d];
        }
        for (int64_t g = 0; g < made && in_bf16; g++) apart(desk.weights + g * c.w, c.w);
        return desk.weights.p;
    }
    // Scores of the first n rows of a KV head, into desk.score [told][rows, rounded up to whole vectors].
    void rows(int64_t b, int64_t h, const float *weights, int64_t n, Desk &desk) const {
        const int64_t ld = round_up(c.n, W);
        for (int64_t j = 0; j < n; j += W) {
            const char *line[W];
            const int64_t some = least<int64_t>(W, n - j);
            for (int64_t i = 0; i < W; i++) {
                const char *from = row_of(c.rows, b, h, j + least(i, some - 1), c.dtype);
                line[i] = in_place ? from : (const char *)(desk.lines + least(i, some - 1) * c.w);
                if (!in_place && i < some) read_row(c.rows, from, c.dtype, c.w, desk.lines + i * c.w);
            }
            for (int64_t g = 0; g < made; g++) {
                vf x[W];
                const float *own = weights + g * c.w;
                if (in_bf16) for (int64_t i = 0; i < W; i++) x[i] = dot((const bf *)line[i], own, c.w);
                else for (int64_t i = 0; i < W; i++) x[i] = dot((const float *)line[i], own, c.w);
                float *to = desk.score + (told > 1 ? g : 0) * ld + j;
                vf y = sums(x);
                if (g && told == 1) for (int64_t i = 0; i < W; i++) y[i] = larger(y[i], to[i]);
                store(to, y);
            }
        }
    }
    void query(int64_t i, Desk &desk) const {
        const int64_t t = i % c.Tq, slot = i / c.Tq, b = slot / c.Hkv, h = slot % c.Hkv, ld = round_up(c.n, W);
        const int64_t last = c.last[b * c.Tq + t], n = least(most<int64_t>(last + 1, 0), c.pages);
        rows(b, h, weights(b, h, t, desk), least(n * c.parts, c.n), desk);
        for (int64_t g = 0; g < told; g++) {
            float *s = desk.score + g * ld;
            const int64_t head = h * told + g, at = (b * heads + head) * c.Tq + t;
            const int64_t near = c.rules ? c.rules[2 * head] : c.near;
            const bool open = !c.rules || c.rules[2 * head + 1];
            for (int64_t p = 0; p < n; p++) {
                float x = s[p * c.parts];
                for (int64_t j = p * c.parts + 1; j < least(c.n, (p + 1) * c.parts); j++) x = larger(x, s[j]);
                s[p] = p < c.sinks || p > last - near ? INF : open ? x : -INF;
                desk.among[p] = s[p] != -INF;
            }
            if (c.index) desk.best.row(s, desk.among.p, n, c.k, c.index + at * c.k);
            if (!c.scores) continue;
            memcpy(c.scores + at * c.pages, s, n * sizeof(float));
            for (int64_t p = n; p < c.pages; p++) c.scores[at * c.pages + p] = -INF;
        }
    }
    int run(SfParallel parallel) {
        Rooms<Desk> desks;
        const bool ok = desks.make(c.threads, [&](Desk &desk) {
            return desk.weights.make(made * c.w) && desk.lines.make(W * c.w) && desk.score.make(told * round_up(c.n, W)) &&
                   desk.among.make(c.pages) && desk.best.make(c.pages);
        });
        if (!ok) return 1;
        auto task = [&](int64_t i, int thread) { query(i, desks[thread]); };
        in_parallel(parallel, c.threads, c.B * c.Hkv * c.Tq, task);
        return 0;
    }
};

inline int pages(const SfPages &c, SfParallel parallel) { return Pages{c}.run(parallel); }

}  // namespace
