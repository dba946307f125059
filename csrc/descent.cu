// The codes of 64 columns of a weight, taken one after another, each the best while all others stay
// as they are: the inner step of quantizer/descent.py, which says what it is for.
//
//     for j in 0 .. 63:    steps[j] = nearest((value[j] - pull[j] / metric[j, j] - zero) / scale)
//                          change   = zero + steps[j] * scale - value[j]
//                          value[j] += change
//                          pull[k]  += metric[j, k] * change       for all k behind j
//
// Columns wait for each other, outputs do not: a thread has one output, its 64 values of `pull` in
// registers. Matrices are (64, N), so threads of a warp read and write next to each other. As
// operations of torch the loop is 576 launches for next to nothing.
#include "device.cuh"

namespace {

constexpr int kThreads = kGroup;
constexpr float kLowest = -8.f, kHighest = 7.f;

struct Arguments {
    const float* metric;  // (64, 64), its diagonal positive
    float* value;         // (64, N): what codes stand for; read and written
    float* steps;         // (64, N): codes; written
    const float* pull;    // (64, N): half of the gradient
    const float* scale;   // (N,)
    const float* zero;    // (N,)
    int n;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) svdq_descent(const Arguments p) {
    __shared__ __align__(16) float metric[kGroup][kGroup];
    __shared__ float reciprocal[kGroup];  // of its diagonal
    for (int i = threadIdx.x * 4; i < kGroup * kGroup; i += kThreads * 4)
        *(float4*)(metric[0] + i) = *(const float4*)(p.metric + i);
    reciprocal[threadIdx.x] = 1.f / p.metric[threadIdx.x * (kGroup + 1)];
    __syncthreads();
    const int output = blockIdx.x * kThreads + threadIdx.x;
    if (output >= p.n) return;

    const float scale = p.scale[output], zero = p.zero[output];
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
    float pull[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
        pull[j] = p.pull[(u64)j * p.n + output];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
        const u64 at = (u64)j * p.n + output;
        const float value = p.value[at];
        const float wanted = fmaf(-pull[j], reciprocal[j], value);
        const float step = fminf(fmaxf(rintf((wanted - zero) * inverse), kLowest), kHighest);
        const float taken = fmaf(step, scale, zero), change = taken - value;
        p.steps[at] = step;
        p.value[at] = taken;
#pragma unroll
        for (int k = j / 4 * 4; k < kGroup; k += 4) {  // those up to j are not needed any more
            const float4 m = *(const float4*)&metric[j][k];
            pull[k] = fmaf(m.x, change, pull[k]);
            pull[k + 1] = fmaf(m.y, change, pull[k + 1]);
            pull[k + 2] = fmaf(m.z, change, pull[k + 2]);
            pull[k + 3] = fmaf(m.w, change, pull[k + 3]);
        }
    }
}
