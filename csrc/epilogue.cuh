// The end of a GEMM whose sums over K need no more than a scale: y = sums + down . proj_up^T +
// bias.
//
// Of a warp's tile of 16 MT x 8 NT outputs, lane (g = lane / 4, q = lane % 4) holds rows g + 8 i
// and the 2 NT consecutive columns from 2 NT q on: column j of its row i is acc[i / 2][j / 2][i % 2
// * 2 + j % 2]. `row0` and `column0` say where a tile begins.
//
// Arguments is the kernel's: of it the low-rank branch reads
//
//     const u16* down;          // (M, padded_rank)
//     const float* down_scale;  // (M,) powers of two that `down` lacks; or null: all are 1
//     const u16* proj_up;       // (N, rank)
//     const u16* bias;          // (N,) or null
//     int m, n, rank, padded_rank;
#pragma once

#include "device.cuh"

// 2 Pairs consecutive elements of a row, of which `columns` exist; the others are left as they are.
template <int Pairs>
SVDQ_DEVICE void load_row(u32 (&pairs)[Pairs], const u16* from, int columns) {
#pragma unroll
    for (int j = 0; j < Pairs; j += 4)
        if (2 * j < columns) {
            const uint4 v = *(const uint4*)(from + 2 * j);
            pairs[j] = v.x, pairs[j + 1] = v.y, pairs[j + 2] = v.z, pairs[j + 3] = v.w;
        }
}

// What a lane's rows of `down` lack. Their sums are divided by it while the product is added, and
// all of it multiplied in the end.
template <class T, int Rows, class Arguments>
SVDQ_DEVICE void load_row_scales(float (&scale)[Rows], const Arguments& p, int row0) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < Rows; ++i)
        scale[i] = !T::kIsBf16 && p.down_scale ? p.down_scale[min(row0 + i * 8 + g, p.m - 1)] : 1.f;
}

// 1 / x of a power of two.
SVDQ_DEVICE float inverse_power(float x) {
    return as_float(0x7F000000u - as_bits(x));
}

// acc += down . proj_up^T. Any order of the rank's columns gives the same sum, so lane q takes
// columns 4q .. 4q + 3 of each 16 as its four: one vector load a row.
template <class T, int MT, int NT, class Arguments>
SVDQ_DEVICE void project_up(float (&acc)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (int k = 4 * q; k - 4 * q < p.rank; k += 16) {
        uint2 b[NT];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const int n = min(column0 + g / 2 * (2 * NT) + nt * 2 + g % 2, p.n - 1);
            b[nt] = k < p.rank ? *(const uint2*)(p.proj_up + (u64)n * p.rank + k) : uint2{0, 0};
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const int m = row0 + mt * 16 + g;
            const uint2 low = *(const uint2*)(p.down + (u64)min(m, p.m - 1) * p.padded_rank + k);
            const uint2 high =
                *(const uint2*)(p.down + (u64)min(m + 8, p.m - 1) * p.padded_rank + k);
            const u32 a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
                mma_16bit<T>(acc[mt][nt], a, b[nt].x, b[nt].y);
        }
    }
}

// acc = row_scale (acc + down . proj_up^T) + bias.
template <class T, int MT, int NT, class Arguments>
SVDQ_DEVICE void add_low_rank_and_bias(float (&acc)[MT][NT][4], const float (&row_scale)[MT * 2],
                                       const Arguments& p, int row0, int column0) {
    const int column = column0 + threadIdx.x % 4 * (2 * NT);
    if (p.rank) project_up<T>(acc, p, row0, column0);
    u32 bias[NT] = {};
    if (p.bias) load_row(bias, p.bias + column, p.n - column);
#pragma unroll
    for (int i = 0; i < MT * 4; ++i)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            float& y = acc[i / 4][nt][i % 4];
            y = fmaf(y, T::kIsBf16 ? 1.f : row_scale[i / 2],
                     i % 2 ? T::high(bias[nt]) : T::low(bias[nt]));
        }
}

// The outputs in 16 bits, to p.out (M, N).
template <class T, int MT, int NT, class Arguments>
SVDQ_DEVICE void store(const float (&acc)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int lane = threadIdx.x % 32, column = column0 + lane % 4 * (2 * NT);
#pragma unroll
    for (int i = 0; i < MT * 2; ++i) {
        const int row = row0 + i * 8 + lane / 4;
        u32 pairs[NT];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const float* y = &acc[i / 2][nt][i % 2 * 2];
            pairs[nt] = T::pack(saturate<T>(y[0]), saturate<T>(y[1]));
        }
        if (row >= p.m) continue;
#pragma unroll
        for (int j = 0; j < NT; j += 4)
            if (column + 2 * j < p.n)
                *(uint4*)(p.out + (u64)row * p.n + column + 2 * j) =
                    make_uint4(pairs[j], pairs[j + 1], pairs[j + 2], pairs[j + 3]);
    }
}
