// Runs the native library's entry points in a process of its own, perhaps of another architecture: reads calls from
// standard input and writes their results to standard output. See cpu_remote.py, which is the other end.
//
//   call:   int64 entry (in the order of ENTRIES), int64 segments, int64 bytes of its structure,
//           {int64 offset of a pointer in the structure, int64 bytes} per segment, the structure, every segment
//   poison: int64 -1, int64 on, int64 0; no answer
//   answer: int64 code, the bytes of every segment
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#include "abi.h"

extern "C" int sf_forward(const SfCall *, int), sf_backward(const SfCall *, int), sf_stats(const SfCall *, int);
extern "C" int sf_linear_forward(const SfLinear *, int), sf_linear_backward(const SfLinear *, int);
extern "C" int sf_stick_forward(const SfCall *, int), sf_stick_backward(const SfCall *, int);
extern "C" int sf_indexer(const SfIndexer *, int), sf_indexer_loss(const SfIndexerLoss *, int);
extern "C" void sf_poison(int);

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
};

static void get(void *p, size_t n) {
    if (n && fread(p, 1, n, stdin) != n) exit(2);
}
static void put(const void *p, size_t n) {
    if (n && fwrite(p, 1, n, stdout) != n) exit(3);
}

int main() {
    int64_t head[3];
    while (fread(head, 8, 3, stdin) == 3) {
        if (head[0] < 0) {
            sf_poison((int)head[1]);
            continue;
        }
        std::vector<int64_t> list(2 * head[1]);
        std::vector<char *> blocks;
        std::vector<char> call(head[2]);
        get(list.data(), list.size() * 8);
        get(call.data(), call.size());
        for (int64_t i = 0; i < head[1]; i++) {
            int64_t bytes = list[2 * i + 1];
            char *block = (char *)malloc(bytes ? bytes : 1);
            get(block, bytes);
            memcpy(call.data() + list[2 * i], &block, 8);
            blocks.push_back(block);
        }
        int64_t code = ENTRIES[head[0]](call.data());
        put(&code, 8);
        for (int64_t i = 0; i < head[1]; i++) {
            put(blocks[i], list[2 * i + 1]);
            free(blocks[i]);
        }
        fflush(stdout);
    }
}
