// [a, GELU(b)], row by row: what a single block's second layer takes.
//
//     a (M, A)  |  b (M, B), rows `stride` apart   ->   out (M, A + B)
//
// A thread has eight columns in each of kAtOnce places of a row, all loaded before any is used.
#include "device.cuh"

namespace {

constexpr int kThreads = 256, kAtOnce = 4;

struct Arguments {
    const u16* a;
    const u16* b;
    u16* out;
    int first, columns, stride;  // of a; of both, eights
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) svdq_gelu_concat(const Arguments p) {
    const u64 row = blockIdx.x;
    const int start = blockIdx.y * kThreads * kAtOnce + threadIdx.x;
    wait_for_kernel_before();
    let_next_kernel_start();
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const int eight = start + i * kThreads;
        if (eight >= p.columns) break;
        v[i] = *(const uint4*)(eight < p.first ? p.a + (row * p.first + eight) * 8
                                               : p.b + row * p.stride + (eight - p.first) * 8);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const int eight = start + i * kThreads;
        if (eight >= p.columns) break;
        u32 pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
        if (eight >= p.first)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                pairs[j] = T::pack(gelu_tanh(T::low(pairs[j])), gelu_tanh(T::high(pairs[j])));
        *(uint4*)(p.out + (row * p.columns + eight) * 8) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
