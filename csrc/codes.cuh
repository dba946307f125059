// Four-bit codes of activations: the rounding that both kernels share.
#pragma once

#include "device.cuh"

// What is quantized of an activation: its value over the smoothing factor, after the shift that
// makes a GELU's output non-negative (unsigned). Finite for finite input.
template <class T, bool Unsigned>
SVDQ_DEVICE float smoothed(float value, float inverse_smooth) {
    return (Unsigned ? value + kGeluShift : value) * inverse_smooth;
}

// Codes per unit of the group's largest magnitude; 0 for a group that is zero for all purposes. The
// quarter keeps the estimate's result a normal number, whatever the largest.
template <bool Unsigned>
SVDQ_DEVICE float inverse_scale(float largest) {
    constexpr float kLimit = Unsigned ? 15.f : 7.f;
    const float quarter = largest * 0.25f;
    const float estimate = reciprocal_estimate(quarter);
    const float r = fmaf(estimate, fmaf(-quarter, estimate, 1.f), estimate) * (kLimit * 0.25f);
    return largest > kFloatTiny * kLimit ? r : 0.f;
}

// Eight values to eight nibbles, the first lowest.
//
// Adding 12582912 (0x4B400000) to a small number rounds it to an integer and leaves that in the low
// bits of the float. The nibbles are then shifted together as they are, in 8 instructions, with the
// constant parts of all eight taken off at the end. Signed codes are offset by 8 meanwhile, so that
// none borrows from its neighbour; flipping each nibble's top bit undoes that.
template <bool Unsigned>
SVDQ_DEVICE u32 pack_codes(const float* values, float inverse) {
    constexpr float kOffset = 12582912.f + (Unsigned ? 0.f : 8.f);
    constexpr u32 kBits = 0x4B400000u * 0x11111111u;  // the constant parts, modulo 2^32
    u32 word = 0;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
        const float value = Unsigned ? fmaxf(values[i], 0.f) : values[i];
        word = (word << 4) + as_bits(fmaf(value, inverse, kOffset));
    }
    word -= kBits;
    return Unsigned ? word : word ^ 0x88888888u;
}

// Four values to four bytes: the codes' magnitudes. Values are not negative, or (unsigned) count as
// 0.
template <bool Unsigned>
SVDQ_DEVICE u32 pack_bytes(const float* values, float inverse) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float value = Unsigned ? fmaxf(values[i], 0.f) : values[i];
        bits[i] = as_bits(fmaf(value, inverse, 12582912.f));
    }
    return low_bytes(bits);
}

// The sign bits of two pairs of 16-bit numbers, as the top bits of four bytes.
SVDQ_DEVICE u32 sign_bytes(u32 first, u32 second) {
    return __byte_perm(first, second, 0x7531) & 0x80808080u;
}

// The same of four values.
SVDQ_DEVICE u32 sign_bytes(const float* values) {
    const u32 first = __byte_perm(as_bits(values[0]), as_bits(values[1]), 0x0073);
    const u32 second = __byte_perm(as_bits(values[2]), as_bits(values[3]), 0x0073);
    return __byte_perm(first, second, 0x5410) & 0x80808080u;
}
