// Between two linear layers of a block, over the rows of x (M, C), each read once:
//
//     h = x + gate * y              SVDQ_GATED
//     z = norm(h) * (1 + scale) + shift,   norm(h) = (h - mean) / sqrt(variance + epsilon)
//                                   SVDQ_NORMED
//
// gate, scale and shift are the image's own: rows of a modulation's output, which M / B rows share.
//
//     row      0 .. 255     256 .. 511     ...      a warp has a row, and a lane eight columns of
//            | lane 0..31 | lane 0..31  |  ...      every 256: it keeps them in registers, since
//                                                   the mean is known at the row's end
//
// fp16 overflows where bf16 does not: h is saturated, and what is no number in it becomes zero, as
// the host's blocks end.
#include "device.cuh"

#ifndef SVDQ_GATED  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_GATED 1
#    define SVDQ_NORMED 1
#endif

namespace {

constexpr bool kGated = SVDQ_GATED, kNormed = SVDQ_NORMED;
constexpr int kWarps = 8, kPieces = 16;  // of a block; of 256 columns each, at most

struct Arguments {
    const u16* x;      // (M, C), C a multiple of 8
    const u16* y;      // (M, C)
    const u16* gate;   // (B, C), rows gate_stride apart
    const u16* scale;  // (B, C), rows norm_stride apart
    const u16* shift;  // likewise
    u16* h;            // (M, C)
    u16* z;            // (M, C)
    int m, c, rows;    // rows that share a modulation
    int gate_stride, norm_stride;
    float epsilon;
};

SVDQ_DEVICE float sum_of_warp(float value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2)
        value += shuffle_xor(value, mask);
    return value;
}

// h in 16 bits.
SVDQ_DEVICE u32 pack_sum(float low, float high) {
    if (!T::kIsBf16) {
        low = low == low ? saturate<T>(low) : 0.f;
        high = high == high ? saturate<T>(high) : 0.f;
    }
    return T::pack(low, high);
}

SVDQ_DEVICE uint4 load16(const u16* from) {
    return *(const uint4*)from;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps * 32, 2) svdq_modulate(const Arguments p) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32;
    wait_for_kernel_before();
    let_next_kernel_start();
    if (row >= p.m) return;
    const u64 at = (u64)row * p.c;
    const int image = row / p.rows, first = 8 * lane;

    u32 h[kPieces][4];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int column = first + 256 * i;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (column < p.c) v = load16(p.x + at + column);
        h[i][0] = v.x, h[i][1] = v.y, h[i][2] = v.z, h[i][3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int column = first + 256 * i;
        if (column >= p.c) break;
        if constexpr (kGated) {
            const uint4 g = load16(p.gate + (u64)image * p.gate_stride + column);
            const uint4 v = load16(p.y + at + column);
            const u32 gates[4] = {g.x, g.y, g.z, g.w}, ys[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                h[i][j] = pack_sum(fmaf(T::low(gates[j]), T::low(ys[j]), T::low(h[i][j])),
                                   fmaf(T::high(gates[j]), T::high(ys[j]), T::high(h[i][j])));
            *(uint4*)(p.h + at + column) = make_uint4(h[i][0], h[i][1], h[i][2], h[i][3]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sum += T::low(h[i][j]) + T::high(h[i][j]);
    }
    if constexpr (kNormed) {
        const float mean = sum_of_warp(sum) / p.c;
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            if (first + 256 * i >= p.c) break;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float low = T::low(h[i][j]) - mean, high = T::high(h[i][j]) - mean;
                squares = fmaf(low, low, fmaf(high, high, squares));
            }
        }
        const float inverse = rsqrtf(sum_of_warp(squares) / p.c + p.epsilon);
        const u64 of_image = (u64)image * p.norm_stride;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int column = first + 256 * i;
            if (column >= p.c) break;
            const uint4 s = load16(p.scale + of_image + column);
            const uint4 t = load16(p.shift + of_image + column);
            const u32 scales[4] = {s.x, s.y, s.z, s.w}, shifts[4] = {t.x, t.y, t.z, t.w};
            u32 z[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float low = (T::low(h[i][j]) - mean) * inverse;
                const float high = (T::high(h[i][j]) - mean) * inverse;
                z[j] =
                    T::pack(saturate<T>(fmaf(low, 1.f + T::low(scales[j]), T::low(shifts[j]))),
                            saturate<T>(fmaf(high, 1.f + T::high(scales[j]), T::high(shifts[j]))));
            }
            *(uint4*)(p.z + at + column) = make_uint4(z[0], z[1], z[2], z[3]);
        }
    }
}
