// One round of quantizer/descent.py for 64 columns of a weight, whose codes share a scale and a
// zero: these two first, by least squares for the codes, then the codes.
//
//     change = steps * (new scale - scale) + new zero - zero, if that brings the layer closer
//     value += change
//     pull  += metric change
//     for j in 0 .. 63:    steps[j] = nearest((value[j] - pull[j] / metric[j, j] - zero) / scale)
//                          change   = zero + steps[j] * scale - value[j]
//                          value[j] += change
//                          pull[k]  += metric[j, k] * change       for all k behind j
//
// Columns wait for each other, outputs do not: a thread has one output, its 64 values of `pull` in
// registers. Matrices are (64, N), so threads of a warp read and write next to each other. As
// operations of torch it is 600 launches for next to nothing.
#include "device.cuh"

namespace {

constexpr int kThreads = kGroup;
constexpr float kLowest = -8.f, kHighest = 7.f, kDistinct = 1e-5f;

struct Arguments {
    const float* metric;  // (64, 64), its diagonal positive
    float* value;         // (64, N): what codes stand for; read and written
    float* steps;         // (64, N): codes; read and written
    const float* pull;    // (64, N): half of the gradient
    float* scale;         // (N,); read and written
    float* zero;          // (N,); read and written
    int n;
    int bf16;  // whether the file's type is bf16, not fp16
};

// As the file's type has it. bf16 is rounded by hand: sm_75 has no instruction for it.
SVDQ_DEVICE float rounded(float x, bool bf16) {
    if (!bf16) return Fp16::low(Fp16::pack(x, 0.f));
    const u32 bits = as_bits(x);
    return x == x ? as_float((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u) : x;
}

// sum += row * factor, from a column on that is a multiple of four.
SVDQ_DEVICE void add_row(float (&sum)[kGroup], const float (&row)[kGroup], float factor, int from) {
#pragma unroll
    for (int k = from; k < kGroup; k += 4) {
        const float4 m = *(const float4*)&row[k];
        sum[k] = fmaf(m.x, factor, sum[k]);
        sum[k + 1] = fmaf(m.y, factor, sum[k + 1]);
        sum[k + 2] = fmaf(m.z, factor, sum[k + 2]);
        sum[k + 3] = fmaf(m.w, factor, sum[k + 3]);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) svdq_descent(const Arguments p) {
    __shared__ __align__(16) float metric[kGroup][kGroup];
    __shared__ float reciprocal[kGroup];  // of its diagonal
    __shared__ float row_sum[kGroup];     // metric . ones
    for (int i = threadIdx.x * 4; i < kGroup * kGroup; i += kThreads * 4)
        *(float4*)(metric[0] + i) = *(const float4*)(p.metric + i);
    __syncthreads();
    reciprocal[threadIdx.x] = 1.f / metric[threadIdx.x][threadIdx.x];
    float sum = 0.f;
    for (int k = 0; k < kGroup; ++k)
        sum += metric[k][threadIdx.x];  // it is symmetric
    row_sum[threadIdx.x] = sum;
    __syncthreads();
    const int output = blockIdx.x * kThreads + threadIdx.x;
    if (output >= p.n) return;
    const u64 n = p.n;
    float* value = p.value + output;  // of column j: N j further on
    float* steps = p.steps + output;
    const float* const first_pull = p.pull + output;

    // Of scale and zero the objective is a quadratic form: its second derivatives and its slopes.
    float second = 0.f, mixed = 0.f, constant = 0.f, along = 0.f, across = 0.f;
    float curved[kGroup] = {};  // metric . steps
#pragma unroll 2
    for (int j = 0; j < kGroup; ++j) {
        const float step = steps[j * n], slope = first_pull[j * n];
        mixed = fmaf(row_sum[j], step, mixed);
        constant += row_sum[j];
        along = fmaf(-slope, step, along);
        across -= slope;
        add_row(curved, metric[j], step, 0);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
        second = fmaf(steps[k * n], curved[k], second);

    float scale = p.scale[output], zero = p.zero[output];
    const float determinant = second * constant - mixed * mixed;
    const float new_scale =
        rounded(scale + (along * constant - across * mixed) / determinant, p.bf16);
    const float new_zero = rounded(zero + (second * across - mixed * along) / determinant, p.bf16);
    float wider = new_scale - scale, higher = new_zero - zero;
    const float gain = 2.f * (along * wider + across * higher) - second * wider * wider -
                       2.f * mixed * wider * higher - constant * higher * higher;
    // Of codes that are all the same the determinant is nothing but rounding.
    const bool distinct = determinant > kDistinct * second * constant;
    if (distinct && gain > 0.f && new_scale > 0.f) {
        p.scale[output] = scale = new_scale;
        p.zero[output] = zero = new_zero;
    } else {
        wider = higher = 0.f;
    }
    float pull[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
        pull[k] = fmaf(curved[k], wider, fmaf(row_sum[k], higher, first_pull[k * n]));

    // So that all columns' addresses are not kept from above, in local memory.
    asm volatile("" : "+l"(value), "+l"(steps));
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
        const float now = value[j * n] + fmaf(steps[j * n], wider, higher);
        const float wanted = fmaf(-pull[j], reciprocal[j], now);
        const float step = fminf(fmaxf(rintf((wanted - zero) * inverse), kLowest), kHighest);
        const float taken = fmaf(step, scale, zero), change = taken - now;
        steps[j * n] = step;
        value[j * n] = taken;
        add_row(pull, metric[j], change, j / 4 * 4);  // those up to j are not needed any more
    }
}
