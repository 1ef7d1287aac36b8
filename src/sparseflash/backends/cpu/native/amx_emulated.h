// The AMX tile instructions in plain C++, to run the AMX kernels on machines that have none. For tests only: slow.
#pragma once
#include <stdint.h>
#include <string.h>

namespace sf_amx {
struct Tile { uint8_t row[16][64]; };
static thread_local Tile tile[8];
inline float half(const uint8_t *p) { uint16_t x; memcpy(&x, p, 2); uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
inline void zero(int t) { memset(&tile[t], 0, sizeof(Tile)); }
inline void loadd(int t, const void *p, int64_t stride) { for (int i = 0; i < 16; i++) memcpy(tile[t].row[i], (const char *)p + i * stride, 64); }
inline void stored(int t, void *p, int64_t stride) { for (int i = 0; i < 16; i++) memcpy((char *)p + i * stride, tile[t].row[i], 64); }
inline void dpbf16ps(int c, int a, int b) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float x;
            memcpy(&x, tile[c].row[i] + 4 * j, 4);
            for (int k = 0; k < 16; k++)
                for (int s = 0; s < 2; s++) x += half(tile[a].row[i] + 4 * k + 2 * s) * half(tile[b].row[k] + 4 * j + 2 * s);
            memcpy(tile[c].row[i] + 4 * j, &x, 4);
        }
}
}  // namespace sf_amx
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#define _tile_zero(t) sf_amx::zero(t)
#define _tile_loadd(t, p, s) sf_amx::loadd(t, p, s)
#define _tile_stored(t, p, s) sf_amx::stored(t, p, s)
#define _tile_dpbf16ps(c, a, b) sf_amx::dpbf16ps(c, a, b)
#define _tile_loadconfig(p) (void)(p)
