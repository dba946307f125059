// Sylvester's matrix over groups of 64 columns, by tensor cores, where values are in registers.
//
// Its element (i, j) is the parity of the bits that i and j share, so it can be taken apart by bits
// of a column's number. A lane of a quad (q = lane % 4) has 16 columns of two rows, as 8 pairs;
// product s takes pairs 2 s and 2 s + 1 of each lane, 16 columns, as its left operand, with 16
// columns of signs at its right. That does the four bits in which those columns differ; the other
// two, which tell the products apart, are sums and differences in one lane:
//
//     bits of a column's number    two      two    two: place among the product's four
//     in a lane's registers        s        q      which pair, and where in it
//     bits of an output's number   products those of a column of signs
//
// It does not matter which two are which. Every lane ends with the columns that it began with.
// The 1 / 8 that makes the matrix orthogonal goes to the scales; 1 / 64 in the signs keeps every
// sum finite.
#pragma once

#include "device.cuh"

// A lane's part of the 16 x 16 signs over 64, as right operands for two halves of the outputs.
struct Signs {
    u32 half[2][2];

    SVDQ_DEVICE explicit Signs(u32 g, u32 q) {
        constexpr u32 kOne = T::kIsBf16 ? 0x3C803C80u : 0x24002400u;  // 2^-6, twice
        const u32 row = __popc(q & g / 2) % 2 * 0x80008000u;  // the bits that tell lanes apart
#pragma unroll
        for (u32 n = 0; n < 2; ++n)
#pragma unroll
            for (u32 k = 0; k < 2; ++k)
                half[n][k] = kOne ^ row ^ (n & k) * 0x80008000u ^ g % 2 * 0x80000000u;
    }
};

using Pairs = u32[2][8];  // a lane's columns of two rows in 16 bits

// Half of the outputs, over 8: result[h][t] are elements 0 and 1 of pair 2 t + n of row h. Returns
// false if one of them is not finite, in which case none of its row is.
SVDQ_DEVICE bool rotate_half(float (&result)[2][4][2], const Pairs& pair, const Signs& signs,
                             int n) {
    float sum[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const u32 a[4] = {pair[0][2 * s], pair[1][2 * s], pair[0][2 * s + 1], pair[1][2 * s + 1]};
        mma_16bit<T>(sum[s], a, signs.half[n][0], signs.half[n][1]);
    }
    bool finite = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int e = 2 * h + i;
            const float plus[2] = {sum[0][e] + sum[1][e], sum[2][e] + sum[3][e]};
            const float minus[2] = {sum[0][e] - sum[1][e], sum[2][e] - sum[3][e]};
            result[h][0][i] = plus[0] + plus[1];
            result[h][1][i] = minus[0] + minus[1];
            result[h][2][i] = plus[0] - plus[1];
            result[h][3][i] = minus[0] - minus[1];
        }
        finite &= fabsf(result[h][0][0]) <= kFloatMax;
    }
    return finite;
}
