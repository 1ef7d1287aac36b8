// Runs the native library's entry points in a process of its own, perhaps of another architecture: reads calls from
// standard input and writes their results to standard output. See cpu_remote.py, which is the other end.
//
//   call:   int64 entry (in the order of ENTRIES), int64 pointers, int64 blocks, int64 bytes of its structure,
//           {int64 offset in the structure, int64 block} per pointer, int64 bytes per block, the structure, every block
//   poison: int64 -1, int64 on, two more; no answer
//   answer: int64 code, the bytes of every block
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#include "abi.h"

extern "C" int sf_forward(const SfCall *, int), sf_backward(const SfCall *, int), sf_stats(const SfCall *, int);
extern "C" int sf_linear_forward(const SfLinear *, int), sf_linear_backward(const SfLinear *, int);
extern "C" int sf_stick_forward(const SfCall *, int), sf_stick_backward(const SfCall *, int);
extern "C" int sf_indexer(const SfIndexer *, int), sf_indexer_loss(const SfIndexerLoss *, int);
extern "C" int sf_decode(const SfDecode *, int);
extern "C" void sf_poison(int);

// Its calls follow it.
static int decode(const SfDecode *given) {
    SfDecode own = *given;
    own.calls = (const SfCall *)(given + 1);
    return sf_decode(&own, 0);
}

static int (*const ENTRIES[])(const void *) = {
    [](const void *c) { return sf_forward((const SfCall *)c, 0); },
    [](const void *c) { return sf_backward((const SfCall *)c, 0); },
    [](const void *c) { return sf_stats((const SfCall *)c, 0); },
    [](const void *c) { return sf_linear_forward((const SfLinear *)c, 0); },
    [](const void *c) { return sf_linear_backward((const SfLinear *)c, 0); },
    [](const void *c) { return sf_stick_forward((const SfCall *)c, 0); },
    [](const void *c) { return sf_stick_backward((const SfCall *)c, 0); },
    [](const void *c) { return sf_indexer((const SfIndexer *)c, 0); },
    [](const void *c) { return sf_indexer_loss((const SfIndexerLoss *)c, 0); },
    [](const void *c) { return decode((const SfDecode *)c); },
};

static void get(void *p, size_t n) {
    if (n && fread(p, 1, n, stdin) != n) exit(2);
}
static void put(const void *p, size_t n) {
    if (n && fwrite(p, 1, n, stdout) != n) exit(3);
}

int main() {
    int64_t head[4];
    while (fread(head, 8, 4, stdin) == 4) {
        if (head[0] < 0) {
            sf_poison((int)head[1]);
            continue;
        }
        std::vector<int64_t> pointers(2 * head[1]), sizes(head[2]);
        std::vector<char *> blocks;
        std::vector<char> call(head[3]);
        get(pointers.data(), pointers.size() * 8);
        get(sizes.data(), sizes.size() * 8);
        get(call.data(), call.size());
        for (int64_t bytes : sizes) {
            blocks.push_back((char *)malloc(bytes ? bytes : 1));
            get(blocks.back(), bytes);
        }
        for (size_t i = 0; i < pointers.size(); i += 2) memcpy(&call[pointers[i]], &blocks[pointers[i + 1]], 8);
        int64_t code = ENTRIES[head[0]](call.data());
        put(&code, 8);
        for (size_t i = 0; i < blocks.size(); i++) {
            put(blocks[i], sizes[i]);
            free(blocks[i]);
        }
        fflush(stdout);
    }
}
