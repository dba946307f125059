// NVFP4: E2M1 codes in groups of 16 columns, each with an E4M3 scale. Conversions, exact
// everywhere.
//
//     E2M1 code     0  1    2  3    4  5  6  7      + 8: negative
//          value    0  0.5  1  1.5  2  3  4  6
//
// Both types are fp16 with fewer bits: E2M1's exponent and mantissa, put at fp16's bit 9, read as
// the value times 2^-14, and E4M3's at bit 7 as the value times 2^-8, subnormals included.
#pragma once

#include "device.cuh"

constexpr float kE4m3Largest = 448.f;

// A quotient of 16-bit numbers, perhaps over a scale, that is off by a few last places, made exact
// if it is a short number, such as a tie between two codes. Others stay on their side of any tie:
// x / (s t), x and s of 11 bits and t of 7 or less, is a tie or at least 2^-18 of itself away.
SVDQ_DEVICE float snap(float quotient) {
    return as_float((as_bits(quotient) + 8) & ~15u);
}

// The E4M3 code of value / 6: nearest, ties to even, the largest for what is beyond. Not negative.
// (Ada and later convert in one instruction; it is one of many, and this runs everywhere.)
SVDQ_DEVICE u32 e4m3_sixth(float value) {
    const float scale = fminf(snap(value * (1.f / 6.f)), kE4m3Largest);
    const u32 bits = as_bits(scale);
    const u32 normal = ((bits + 0x7FFFFu + (bits >> 20 & 1)) >> 20) - (127 - 7) * 8;
    return scale < 0.015625f ? as_bits(scale + 16384.f) & 15 : normal;  // a step of 2^-9 below 2^-6
}

SVDQ_DEVICE float e4m3_value(u32 code) {
    return Fp16::low(code << 7) * 256.f;
}

// A magnitude rounded to E2M1, ties to even and saturating, on top of `offset`: a binade has two
// values, half of it apart, and so has a float 2^22 times its size in its last place.
SVDQ_DEVICE float e2m1_round(float value, float& offset) {
    const float magnitude = fminf(fabsf(value), 6.f);
    offset = as_float(as_bits(fmaxf(magnitude, 1.f)) & 0x7F800000u) * 4194304.f;
    return magnitude + offset;
}

// Eight values to eight E2M1 codes, the first lowest: nearest, ties to even, saturating; zeros keep
// their sign.
SVDQ_DEVICE u32 e2m1_codes(const float* values) {
    u32 codes;
#ifdef __CUDA_ARCH_FEAT_SM120_ALL
    asm("{ .reg .b8 a, b, c, d;"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1; cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5; cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;"
        "mov.b32 %0, {a, b, c, d}; }"
        : "=r"(codes)
        : "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "f"(values[4]),
          "f"(values[5]), "f"(values[6]), "f"(values[7]));
#else
    u32 bits[8];
#    pragma unroll
    for (int i = 0; i < 8; ++i) {
        float offset;
        const u32 rounded = as_bits(e2m1_round(values[i], offset));
        bits[i] = rounded + (rounded >> 22) + 6;  // twice the binade more: 2^22 has 298 - 2 there
    }
    u32 half[2];  // a byte for each of the even codes, and of the odd
#    pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u32 low = __byte_perm(__byte_perm(bits[h], bits[2 + h], 0x0040),
                                    __byte_perm(bits[4 + h], bits[6 + h], 0x0040), 0x5410);
        const u32 high = __byte_perm(
            __byte_perm(as_bits(values[h]), as_bits(values[2 + h]), 0x0073),
            __byte_perm(as_bits(values[4 + h]), as_bits(values[6 + h]), 0x0073), 0x5410);
        half[h] = (low & 0x07070707u) | (high & 0x80808080u) >> 4;
    }
    codes = half[0] | half[1] << 4;
#endif
    return codes;
}

// The E4M3 code of a group's scale and the group's values in units of it (zeros if it is 0).
template <class T>
SVDQ_DEVICE u32 scale_group(const u32 (&pairs)[8], const float (&inverse_smooth)[16],
                            float (&steps)[16]) {
    float part[4] = {};  // four chains of maxima, not one long one
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        steps[i] = (i % 2 ? T::high(pairs[i / 2]) : T::low(pairs[i / 2])) * inverse_smooth[i];
        part[i % 4] = fmaxf(part[i % 4], fabsf(steps[i]));
    }
    const u32 code = e4m3_sixth(fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3])));
    const float inverse = code ? reciprocal(e4m3_value(code)) : 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i)
        steps[i] = snap(steps[i] * inverse);
    return code;
}
