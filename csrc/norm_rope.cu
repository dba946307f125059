// From a fused layer's output to what attention takes: of each token's [q, k, v], q and k are
// normalized head by head (root mean square) and rotated, and all three go to tensors of their own.
//
//     in:   token | q: head 0, head 1 .. | k: head 0 .. | v: head 0 ..| (whatever follows)
//     out:  q, k, v, each (B, tokens, heads, D), these tokens from `start` on
//
// In this order attention's own output is, too, that of the layer after it: nobody transposes it.
//
// A warp has a token. A lane has eight columns, D / 8 lanes a head: the token's rotation stays in
// registers while the warp goes through the heads, a few at a time.
//
// The rotation is four factors for every pair of columns: (a, b) -> (f0 a + f1 b, f2 a + f3 b).
#include "device.cuh"

#ifndef SVDQ_HEAD  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_HEAD 128
#endif

namespace {

constexpr int kHead = SVDQ_HEAD, kLanes = kHead / 8, kAtOnce = 32 / kLanes;  // lanes of a head
constexpr int kWarps = 4, kBatch = 2;  // of a block; times kAtOnce heads that are read at once

struct Arguments {
    const u16* qkv;       // (B, L, 3 heads D and more), tokens `stride` apart
    const u16* weight_q;  // (D,)
    const u16* weight_k;
    const float* rope;  // (B or 1, tokens, D / 2, 4)
    u16* q;             // (B, tokens, heads, D)
    u16* k;
    u16* v;
    int batch, length, heads;  // L
    int tokens, start, stride;
    int rope_batch;  // floats from an image's rotation to the next one's, or 0
    float epsilon;
};

SVDQ_DEVICE void unpack(float (&values)[8], const uint4& v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        values[2 * i] = T::low(pairs[i]), values[2 * i + 1] = T::high(pairs[i]);
}

SVDQ_DEVICE uint4 normalized(const uint4& from, const float (&weight)[8], const float4 (&factor)[4],
                             float epsilon) {
    float x[8], squares = 0.f;
    unpack(x, from);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        squares = fmaf(x[i], x[i], squares);
#pragma unroll
    for (int mask = kLanes / 2; mask; mask /= 2)
        squares += shuffle_xor(squares, mask);
    const float inverse = rsqrtf(squares / kHead + epsilon);
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float a = x[2 * i] * inverse * weight[2 * i];
        const float b = x[2 * i + 1] * inverse * weight[2 * i + 1];
        pairs[i] = T::pack(saturate<T>(fmaf(factor[i].x, a, factor[i].y * b)),
                           saturate<T>(fmaf(factor[i].z, a, factor[i].w * b)));
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps * 32, 5) svdq_norm_rope(const Arguments p) {
    const int lane = threadIdx.x % 32, token = blockIdx.x * kWarps + threadIdx.x / 32;
    const int image = blockIdx.y, column = lane % kLanes * 8;
    wait_for_kernel_before();
    let_next_kernel_start();
    if (token >= p.length) return;

    float weight_q[8], weight_k[8];
    unpack(weight_q, *(const uint4*)(p.weight_q + column));
    unpack(weight_k, *(const uint4*)(p.weight_k + column));
    const int place = p.start + token;
    const float4* const rope =
        (const float4*)(p.rope + (u64)image * p.rope_batch) + (u64)place * (kHead / 2) + column / 2;
    float4 factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        factor[i] = rope[i];

    const u16* from = p.qkv + ((u64)image * p.length + token) * p.stride + column;
    const int part = p.heads * kHead;
    for (int first = 0; first < p.heads; first += kBatch * kAtOnce) {
        // All are read before anything is written: reads do not pass writes.
        uint4 q[kBatch], k[kBatch], v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int head = min(first + i * kAtOnce + lane / kLanes, p.heads - 1);
            const u16* const x = from + head * kHead;
            q[i] = *(const uint4*)x;
            k[i] = *(const uint4*)(x + part);
            v[i] = *(const uint4*)(x + 2 * part);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int head = first + i * kAtOnce + lane / kLanes;
            const uint4 new_q = normalized(q[i], weight_q, factor, p.epsilon);
            const uint4 new_k = normalized(k[i], weight_k, factor, p.epsilon);
            if (head >= p.heads) continue;
            const u64 to = (((u64)image * p.tokens + place) * p.heads + head) * kHead + column;
            *(uint4*)(p.q + to) = new_q;
            *(uint4*)(p.k + to) = new_k;
            *(uint4*)(p.v + to) = v[i];
        }
    }
}
