// Codes of x / smooth_factor with one scale a row                               (SVDQuant, table 1)
//
//     qact[m, k] = round(x[m, k] / smooth[k] / act_scale[m]),  act_scale[m] = absmax of the row /
//     127
//
// The largest of each row, slice by slice, and x . proj_down were found before (quantize_nvfp4.cu,
// OUTPUT 2), so x comes mostly from the second-level cache. A block has four rows, and its threads
// take turns at eight columns, whose smoothing factors serve all four.
#include "device.cuh"

namespace {

constexpr int kThreads = 128, kRows = 4;  // a row for each warp, to begin with
constexpr float kLargestCode = 127.f;

struct Arguments {
    const u16* x;              // (M, K)
    const u16* smooth_factor;  // (K,)
    const float* largest;      // (slices, M) of x / smooth_factor
    u8* qact;                  // (M, K)
    float* act_scale;          // (M,)
    int m, k, slices;
};

// Two values to their codes, in the low bytes. Adding 12582912 rounds to an integer in a float's
// low bits; what overflowed when it was smoothed is as large as can be.
SVDQ_DEVICE u32 encode(u32 pair, float low_factor, float high_factor, float inverse_scale) {
    const float low = T::low(pair) * low_factor * inverse_scale;
    const float high = T::high(pair) * high_factor * inverse_scale;
    return __byte_perm(as_bits(fminf(fmaxf(low, -kLargestCode), kLargestCode) + 12582912.f),
                       as_bits(fminf(fmaxf(high, -kLargestCode), kLargestCode) + 12582912.f),
                       0x0040);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    svdq_quantize_int8(const __grid_constant__ Arguments p) {
    __shared__ float inverse_scales[kRows];
    wait_for_kernel_before();
    let_next_kernel_start();
    const int first = blockIdx.x * kRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    {
        const int m = min(first + warp, p.m - 1);
        float top = 0.f;
        for (int slice = lane; slice < p.slices; slice += 32)
            top = fmaxf(top, p.largest[(u64)slice * p.m + m]);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2)
            top = fmaxf(top, shuffle_xor(top, mask));
        // Below this the reciprocal overflows; such a row is zero for all purposes.
        const bool zero = !(top > kFloatTiny * kLargestCode);
        if (lane == 0) {
            inverse_scales[warp] = zero ? 0.f : __fdiv_rn(kLargestCode, top);
            if (first + warp < p.m) p.act_scale[m] = zero ? 0.f : __fdiv_rn(top, kLargestCode);
        }
    }
    __syncthreads();
    for (int k = 8 * threadIdx.x; k < p.k; k += 8 * kThreads) {
        const uint4 smooth = *(const uint4*)(p.smooth_factor + k);
        const u32 pairs[4] = {smooth.x, smooth.y, smooth.z, smooth.w};
        uint4 x[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            x[i] = *(const uint4*)(p.x + (u64)min(first + i, p.m - 1) * p.k + k);
        float factor[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            factor[2 * i] = reciprocal(T::low(pairs[i]));
            factor[2 * i + 1] = reciprocal(T::high(pairs[i]));
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (first + i >= p.m) break;
            const float inverse = inverse_scales[i];
            uint2 codes;
            codes.x = __byte_perm(encode(x[i].x, factor[0], factor[1], inverse),
                                  encode(x[i].y, factor[2], factor[3], inverse), 0x5410);
            codes.y = __byte_perm(encode(x[i].z, factor[4], factor[5], inverse),
                                  encode(x[i].w, factor[6], factor[7], inverse), 0x5410);
            *(uint2*)(p.qact + (u64)(first + i) * p.k + k) = codes;
        }
    }
}
