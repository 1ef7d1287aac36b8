// Runs the native library's entry points in a process of its own, perhaps of another architecture: reads calls from
// standard input and writes their results to standard output. See cpu_remote.py, which is the other end.
//
//   call:   int64 kind (0 forward, 1 backward, 2 statistics, 3 poison: one more int64), int64 segments,
//           {int64 offset of a pointer in SfCall, int64 bytes} per segment, SfCall, the bytes of every segment
//   answer: int64 code, the bytes of every segment
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#include "abi.h"

extern "C" int sf_forward(const SfCall *, int), sf_backward(const SfCall *, int), sf_stats(const SfCall *, int);
extern "C" void sf_poison(int);

static void get(void *p, size_t n) {
    if (n && fread(p, 1, n, stdin) != n) exit(2);
}
static void put(const void *p, size_t n) {
    if (n && fwrite(p, 1, n, stdout) != n) exit(3);
}

int main() {
    int64_t head[2];
    put(std::vector<int64_t>{(int64_t)sizeof(SfCall)}.data(), 8);
    fflush(stdout);
    while (fread(head, 8, 2, stdin) == 2) {
        if (head[0] == 3) {
            sf_poison((int)head[1]);
            continue;
        }
        std::vector<int64_t> list(2 * head[1]);
        std::vector<char *> blocks;
        alignas(64) char call[sizeof(SfCall)];
        get(list.data(), list.size() * 8);
        get(call, sizeof call);
        for (int64_t i = 0; i < head[1]; i++) {
            int64_t bytes = list[2 * i + 1];
            char *block = (char *)malloc(bytes ? bytes : 1);
            get(block, bytes);
            memcpy(call + list[2 * i], &block, 8);
            blocks.push_back(block);
        }
        const SfCall *c = (const SfCall *)call;
        int64_t code = head[0] == 0 ? sf_forward(c, 0) : head[0] == 1 ? sf_backward(c, 0) : sf_stats(c, 0);
        put(&code, 8);
        for (int64_t i = 0; i < head[1]; i++) {
            put(blocks[i], list[2 * i + 1]);
            free(blocks[i]);
        }
        fflush(stdout);
    }
}
