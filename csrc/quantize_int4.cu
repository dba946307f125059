// From x (M, K): 4-bit codes of x / smooth, their scales, and x . proj_down, reading x once.
//
// The first half of an SVDQuant W4A4 layer. One build of this file is one kernel, shaped by the
// macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// A warp takes 16 rows and a slice of the columns, group after group of 64; a block is WARPS warps
// above each other, over the same slice. The same 16 bytes of x that a lane loads serve it as what
// is quantized and as its part of the matrix product's right operand (the product is transposed,
// proj_down^T . x^T, because that operand's registers are a row's own), so x never leaves the
// registers. For that the product's columns are dealt anew: a product over 16 columns wants four
// from each lane of a quad (lane q = lane % 4), and a lane loads
//
//     chunk 0: columns 8q .. 8q + 7        chunk 1: columns 32 + 8q .. 32 + 8q + 7
//
// of rows g and g + 8 (g = lane / 4), so product s takes columns 32 (s / 2) + 8q + 4 (s % 2) .. +
// 3, and the rows of proj_down are fetched from shared memory in the same order: row j of a
// fragment's half h is 32 (s / 2) + 8 (j / 2) + 4 (s % 2) + 2h + j % 2.
//
// proj_down comes to shared memory a step of a few groups at a time, two such steps in turn, for
// the whole block. x comes through shared memory too, STAGES - 1 groups ahead of its use: enough
// bytes on their way to keep the memory busy, without registers to wait in. Of x every lane copies
// what it will use itself, so nobody waits for anybody.
//
// Shared memory:   step 0 | step 1 | x | 1 / smooth for the slice, float32 | (image) chunks' scales
//          step:   a slab for each group: its 64 rows of proj_down
//             x:   for each warp STAGES times 2 KB: chunk i of lane l at 512 i + 16 l
//
// The rows of a slab that one ldmatrix reads differ in row / 8 % 4 and row % 2, which with the
// swizzle below puts them into eight different 16-byte columns:
//
//     stride 64 bytes (up to 32 ranks):  chunk c at c ^ (row / 8 % 4); row % 2 picks the line's
//     half stride 128 bytes (64 ranks):       chunk c at c ^ (row / 8 % 4 + 4 (row % 2))
//
// With SVDQ_PROLOGUE = 3 what is quantized is rotated (rotation.cuh): product s has the columns
// that differ in bits 0, 1, 3 and 4, and a lane's four of them differ in bits 0 and 1.
//
// Hopper multiplies bytes, and x . proj_down in 16 bits. SVDQ_OUTPUT says how they are written:
//
//   image    as csrc/gemm_hopper.cu reads it: magnitude and sign, swizzled; scales as fp16 relative
//            to the largest of their chunk of eight groups
//   bytes    for csrc/gemm_grid.cu: int8 codes in the order of x, scales in float32
#include "codes.cuh"
#include "device.cuh"
#include "rotation.cuh"

#ifndef SVDQ_UNSIGNED  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_UNSIGNED 0
#    define SVDQ_RANK_TILES 4
#    define SVDQ_PROLOGUE 0
#    define SVDQ_STAGES 4
#    define SVDQ_OUTPUT 0
#endif

namespace {

constexpr bool kUnsigned = SVDQ_UNSIGNED;
constexpr int RT = SVDQ_RANK_TILES;  // products of 8 ranks each; 0 without a low-rank branch

enum Form { kNibbles = 0, kImage = 1, kBytes = 2 };
constexpr Form kForm = (Form)SVDQ_OUTPUT;
enum Prologue { kNone = 0, kGelu = 1, kModulate = 2, kRotate = 3 };
constexpr Prologue kPrologue = (Prologue)SVDQ_PROLOGUE;

// Bytes of the image hold a magnitude and a sign: the magnitude is worked out here, the sign is
// x's, or what the rotation made of it.
constexpr bool kMagnitude = kForm == kImage && !kUnsigned;
constexpr bool kSignOfX = kMagnitude && kPrologue != kRotate;

constexpr int kMostThreads = 448, kRows = 16, kStages = SVDQ_STAGES;
constexpr int kStep = RT > 4 ? 2 : 4;  // groups whose slabs come at once
constexpr int kChunk = 8;              // groups whose scales are relative to one another's (image)
constexpr int kTiles = RT ? RT : 1;
constexpr int kStride = RT > 4 ? 128 : 64;  // bytes of a slab's row
constexpr u32 kSlab = RT ? kGroup * kStride : 0;
constexpr u32 kStepBytes = kStep * kSlab;
constexpr u32 kWarpX = 2048;                                           // a warp's part of a stage
constexpr u32 kScaleBytes = kForm == kImage ? kRows * kChunk * 4 : 0;  // of a warp

// A lane's part of x . proj_down: of 16 t + g (element 0, 1) and 16 t + g + 8 (2, 3), rows 8 h + 2
// q (0, 2) and + 1 (1, 3), where its q and g are a fragment's, t the first index and h the second.
using Sums = float[RT ? RT / 2 : 1][2][4];

struct Arguments {
    const u16* x;          // (M, K)
    const u16* smooth;     // (K,)
    const u16* proj_down;  // (K, rank)
    u8* qact;              // (M, K / 2); bytes: (M, K); image: (K / 128, padded M, 128)
    void* act_scale;       // (K / 64, padded M) float32; image: (K / 128, padded M, 2) pairs
    // (M, rank) float32; bytes: (M, rank to a multiple of 64), image: (rank / 64, padded M, 64),
    // 16-bit
    void* down;
    float* partial;  // sums of each slice, as a warp's lanes hold them
    u32* counters;   // zero, one for each 16 rows and block of ranks
    int m, k, rank, slice_groups;
    // kModulate: x (1 + scale) + shift
    const u16* modulation_scale;  // (M / modulation_rows, K)
    const u16* modulation_shift;
    int modulation_rows;
    int padded_m;        // M for nibbles
    float* chunk_scale;  // (K / 512, padded M); image only
    float* down_scale;   // (rank / 64, padded M); not with nibbles, fp16 only
};

// Where chunk `chunk` of row `row` of a slab lies.
SVDQ_DEVICE u32 slab_offset(u32 row, u32 chunk) {
    const u32 swizzle = row / 8 % 4 + (kStride == 128 ? row % 2 * 4 : 0);
    return row * kStride + ((chunk ^ swizzle) << 4);
}

// A lane's share of a group: two rows, 16 columns each as 8 pairs.
struct Fragment {
    u32 pair[2][8];

    SVDQ_DEVICE explicit Fragment(u32 shared) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = load_shared16(shared + 512 * i);
            u32* to = &pair[i / 2][i % 2 * 4];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
};

SVDQ_DEVICE void apply_gelu(Fragment& x) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        u32& pair = x.pair[i / 8][i % 8];
        pair = T::pack(gelu_tanh(T::low(pair)), gelu_tanh(T::high(pair)));
    }
}

SVDQ_DEVICE void apply_modulation(Fragment& x, const Arguments& p, u32 row0, u32 row1, u32 column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u64 at = (u64)((h ? row1 : row0) / (u32)p.modulation_rows) * p.k + column;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4 s = *(const uint4*)(p.modulation_scale + at + 32 * i);
            const uint4 t = *(const uint4*)(p.modulation_shift + at + 32 * i);
            const u32 scale[4] = {s.x, s.y, s.z, s.w}, shift[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32& pair = x.pair[h][4 * i + j];
                pair = T::pack(
                    saturate<T>(fmaf(T::low(pair), 1.f + T::low(scale[j]), T::low(shift[j]))),
                    saturate<T>(fmaf(T::high(pair), 1.f + T::high(scale[j]), T::high(shift[j]))));
            }
        }
    }
}

// 1 / smooth; where the sign is x's, the weight's image has smooth's.
SVDQ_DEVICE float inverse_factor(float smooth) {
    return reciprocal(kSignOfX ? fabsf(smooth) : smooth);
}

using Values = float[16];  // of a row, in the order of its pairs

// `inverse_smooth` is shared memory with the group's 64 floats from this lane's first column on.
SVDQ_DEVICE void smooth_row(Values& values, const u32 (&pair)[8], u32 inverse_smooth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 s = load_shared16(inverse_smooth + i / 2 * 128 + i % 2 * 16);
        const u32 first = pair[2 * i], second = pair[2 * i + 1];
        const float x[4] = {T::low(first), T::high(first), T::low(second), T::high(second)};
        const u32 inverse[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            values[4 * i + j] = kSignOfX ? fabsf(x[j]) * as_float(inverse[j])
                                         : smoothed<T, kUnsigned>(x[j], as_float(inverse[j]));
    }
}

// The group's smoothed values in 16 bits, rotated, over 8; false if a row's are not finite.
SVDQ_DEVICE bool rotate(Values (&values)[2], const Signs& signs, bool clamp) {
    Pairs pair;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float low = values[h][2 * i], high = values[h][2 * i + 1];
            pair[h][i] = clamp ? T::pack(saturate<T>(low), saturate<T>(high)) : T::pack(low, high);
        }
    bool finite = true;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float half[2][4][2];
        finite &= rotate_half(half, pair, signs, n);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            values[i / 8][i / 2 % 4 * 4 + 2 * n + i % 2] = half[i / 8][i / 2 % 4][i % 2];
    }
    return finite;
}

// Both rows' values of a group.
SVDQ_DEVICE void values_of(Values (&values)[2], const Fragment& x, u32 inverse_smooth,
                           const Signs& signs) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
        smooth_row(values[h], x.pair[h], inverse_smooth);
    if constexpr (kPrologue == kRotate) {
        if (__all_sync(0xFFFFFFFFu, rotate(values, signs, false))) return;
#pragma unroll
        for (int h = 0; h < 2; ++h)
            smooth_row(values[h], x.pair[h], inverse_smooth);
        rotate(values, signs, true);
    }
}

// Quantizes one row of a group. `codes` are 16 nibbles or 16 bytes. Every lane of the quad returns
// the group's scale.
SVDQ_DEVICE float quantize_row(Values& values, const u32 (&pair)[8], u32 (&codes)[4]) {
    float part[4];  // four chains of maxima, not one long one
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float value = kUnsigned || kSignOfX ? values[i] : fabsf(values[i]);
        part[i % 4] = fmaxf(i < 4 ? 0.f : part[i % 4], value);
    }
    float largest = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    largest = quad_max(largest);
    if (kPrologue != kRotate && largest > kFloatMax) {  // x / smooth overflowed
        largest = kFloatMax;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            values[i] = fminf(fmaxf(values[i], -kFloatMax), kFloatMax);
    }
    const float inverse = inverse_scale<kUnsigned>(largest);
    if constexpr (kForm != kNibbles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* four = values + 4 * i;
            if constexpr (kMagnitude) {
                const float magnitudes[4] = {fabsf(four[0]), fabsf(four[1]), fabsf(four[2]),
                                             fabsf(four[3])};
                codes[i] = pack_bytes<kUnsigned>(magnitudes, inverse) |
                           (kSignOfX ? sign_bytes(pair[2 * i], pair[2 * i + 1]) : sign_bytes(four));
            } else {
                codes[i] = pack_bytes<kUnsigned>(four, inverse);
            }
        }
    } else {
        codes[0] = pack_codes<kUnsigned>(values, inverse);
        codes[1] = pack_codes<kUnsigned>(values + 8, inverse);
    }
    constexpr float kUnit = kUnsigned ? 1.f / 15.f : kPrologue == kRotate ? 8.f / 7.f : 1.f / 7.f;
    return inverse > 0.f ? fminf(largest * kUnit, kFloatMax) : 0.f;
}

// What a warp needs to know to write what it makes. Pointers are to where the next group goes.
struct Output {
    const Arguments& p;
    u32 row0, lane, g, q;
    u32 scales;  // image: shared memory for the scales of a chunk, (16 rows, 8 groups)
    u8* to_codes[2];
    float* to_scale;

    SVDQ_DEVICE Output(const Arguments& p, u32 row0, u32 lane, u32 scales, u32 first)
        : p(p), row0(row0), lane(lane), g(lane / 4), q(lane % 4), scales(scales) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            const u64 row = row0 + g + 8 * h;
            const u64 at = row * p.k + first * kGroup;
            to_codes[h] = kForm == kImage   ? p.qact + ((u64)(first / 2) * p.padded_m + row) * 128
                          : kForm == kBytes ? p.qact + at + q * 8
                                            : p.qact + at / 2 + q * 4;
        }
        to_scale = (float*)p.act_scale + (u64)first * p.padded_m + row0 + g;
    }

    // `odd`: whether the group is an odd one of all.
    SVDQ_DEVICE void codes(u32 group, bool odd, u32 h, const u32 (&codes)[4], float scale) {
        const bool exists = row0 + g + 8 * h < (u32)p.m;
        u8* to = to_codes[h];
        if (kForm == kImage) {
            // 16 bytes of a lane are the quad's q-th of the group: see hopper.py for the order.
            const u32 chunk = (odd * 4 + q) ^ g;
            if (exists)
                *(uint4*)(to + chunk * 16) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
            if (q == 0)
                store_shared4(scales + ((g + 8 * h) * kChunk + group % kChunk) * 4, as_bits(scale));
            if (odd) to_codes[h] += (u64)p.padded_m * 128;
        } else {
            if (exists) {
                if (kForm == kBytes) {
                    *(uint2*)to = make_uint2(codes[0], codes[1]);
                    *(uint2*)(to + 32) = make_uint2(codes[2], codes[3]);
                } else {
                    *(u32*)to = codes[0];
                    *(u32*)(to + 16) = codes[1];
                }
                if (q == 0) to_scale[8 * h] = scale;
            }
            to_codes[h] += kForm == kBytes ? kGroup : kGroup / 2;
            if (h) to_scale += p.padded_m;
        }
    }

    // Image: the scales of a chunk of `count` groups, relative to each row's largest.
    SVDQ_DEVICE void chunk(u32 chunk, u32 count) const {
        __syncwarp();
        const u32 row = row0 + lane / 2, half = lane % 2 * 4;
        const uint4 v = load_shared16(scales + lane * 16);
        float s[4] = {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)}, largest = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (half + i >= count) s[i] = 0.f;
            largest = fmaxf(largest, s[i]);
        }
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        const float inverse = largest > 0.f ? reciprocal(largest) : 0.f;
        u32 twice[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float relative = s[i] * inverse * 512.f;
            twice[i] = Fp16::pack(relative, relative);
        }
        __syncwarp();
        if (row >= (u32)p.m) return;
        u32* to = (u32*)p.act_scale + ((u64)(chunk * 4 + half / 2) * p.padded_m + row) * 2;
        if (half < count) *(uint2*)to = make_uint2(twice[0], twice[1]);
        if (half + 2 < count) *(uint2*)(to + (u64)p.padded_m * 2) = make_uint2(twice[2], twice[3]);
        if (half == 0) p.chunk_scale[(u64)chunk * p.padded_m + row] = largest * kChunkUnit;
    }
    // Room for sums near the largest float32: gemm_hopper.cu takes it back by the column's scale.
    static constexpr float kChunkUnit = T::kIsBf16 ? 1.f / 1048576.f : 1.f;

    // The finished sums of 8 RT ranks from rank0 on.
    SVDQ_DEVICE void down(const Sums& sum, u32 rank0) const {
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 e = 0; e < 2; ++e) {
                const u32 row = row0 + 8 * h + 2 * q + e;
                float scale = 1.f;
                if (kForm != kNibbles &&
                    !T::kIsBf16) {  // to fp16's range, by a power of two for each row
                    float largest = 0.f;
#pragma unroll
                    for (int t = 0; t < RT; ++t)
                        largest = fmaxf(largest, fabsf(sum[t / 2][h][t % 2 * 2 + e]));
                    largest = fmaxf(largest, shuffle_xor(largest, 4));
                    largest = fmaxf(largest, shuffle_xor(largest, 8));
                    largest = fmaxf(largest, shuffle_xor(largest, 16));
                    // 2^(10 - exponent of the largest); small ones stay small, or they would make
                    // the other sums overflow when these are relative to them.
                    const int exponent = 137 - (int)(as_bits(largest) >> 23);
                    scale = as_float((u32)(max(min(exponent, 30), -100) + 127) << 23);
                    if (g == 0 && row < (u32)p.m)
                        p.down_scale[(u64)(rank0 / 64) * p.padded_m + row] = 1.f / scale;
                }
                if (row >= (u32)p.m) continue;
#pragma unroll
                for (u32 t = 0; t < RT; ++t) {
                    const u32 rank = rank0 + t * 8 + g;
                    const float value = sum[t / 2][h][t % 2 * 2 + e];
                    if (kForm != kNibbles) {
                        // Far from overflow: products of these are added without a check.
                        constexpr float kMost = T::kIsBf16 ? 0x1p96f : T::kLargest;
                        const u64 width = (p.rank + 63) / 64 * 64;
                        const u64 at = kForm == kBytes
                                           ? row * width + rank
                                           : ((u64)(rank / 64) * p.padded_m + row) * 64 +
                                                 ((rank % 64 / 8) ^ (row % 8)) * 8 + g;
                        ((u16*)p.down)[at] =
                            (u16)T::pack(fminf(fmaxf(value * scale, -kMost), kMost), 0.f);
                    } else if (rank < (u32)p.rank) {
                        ((float*)p.down)[(u64)row * p.rank + rank] =
                            fminf(fmaxf(value, -kFloatMax), kFloatMax);
                    }
                }
            }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kMostThreads, 1)
    svdq_quantize_int4(const Arguments p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 g = lane / 4, q = lane % 4;
    const u32 first = blockIdx.y * p.slice_groups;
    const u32 count = min(p.slice_groups, p.k / kGroup - (int)first);
    const u32 rank0 = blockIdx.z * RT * 8;
    const bool quantizes = blockIdx.z == 0;  // the blocks of further ranks only multiply

    const u32 tile = blockIdx.x * warps + warp, row0 = tile * kRows;
    const u32 last_row = p.m - 1;
    const u16* x0 = p.x + (u64)min(row0 + g, last_row) * p.k + first * kGroup + 8 * q;
    const u16* x1 = p.x + (u64)min(row0 + g + 8, last_row) * p.k + first * kGroup + 8 * q;

    const u32 slabs = shared_address(memory);
    const u32 ring = slabs + 2 * kStepBytes + warp * kStages * kWarpX + lane * 16;
    const u32 inverse_smooth = slabs + 2 * kStepBytes + warps * kStages * kWarpX;
    const u32 scales = inverse_smooth + p.slice_groups * kGroup * 4 + warp * kScaleBytes;
    Output out(p, row0, lane, scales, first);

    u32 filled = 0, write = ring, read = ring;
    auto copy_x = [&] {  // the next group's
        if (filled++ < count) {
#pragma unroll
            for (int c = 0; c < 4; ++c)
                copy_or_zero<16>(write + 512 * c, (c < 2 ? x0 : x1) + c % 2 * 32, true);
            x0 += kGroup;
            x1 += kGroup;
            write = write == ring + (kStages - 1) * kWarpX ? ring : write + kWarpX;
        }
        copy_commit();
    };
    auto copy_step = [&](u32 step) {
        if constexpr (RT > 0) {
            const u32 to = slabs + step % 2 * kStepBytes;
            const int groups = min(kStep, (int)(count - step * kStep));
            const u16* from = p.proj_down + (u64)(first + step * kStep) * kGroup * p.rank + rank0;
            for (int i = threadIdx.x; i < groups * kGroup * RT; i += blockDim.x) {
                const u32 row = (u32)i / kTiles, chunk = (u32)i % kTiles;
                copy_or_zero<16>(to + row / kGroup * kSlab + slab_offset(row % kGroup, chunk),
                                 from + (u64)row * p.rank + chunk * 8, rank0 + chunk * 8 < p.rank);
            }
        }
    };

    copy_step(0);
    copy_step(1);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i)
        copy_x();
    for (u32 i = threadIdx.x; i < count * kGroup / 2; i += blockDim.x) {
        const u32 pair = ((const u32*)(p.smooth + first * kGroup))[i];
        store_shared4(inverse_smooth + 8 * i, as_bits(inverse_factor(T::low(pair))));
        store_shared4(inverse_smooth + 8 * i + 4, as_bits(inverse_factor(T::high(pair))));
    }
    __syncthreads();

    const Signs signs(g, q);
    Sums sum = {};
    // Fragment rows of products s: 32 (s / 2) + 4 (s % 2) rows on from these, which leaves the
    // swizzle as it is; chunks 2 t on flip bits of the chunk's number.
    const u32 fragment =
        slabs + slab_offset(lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2, lane / 8 % 2);

    auto take_group = [&](u32 i, bool odd) {
        const bool next_step = i % kStep == 0;
        if (RT && next_step && i) {
            __syncthreads();  // everyone is done with the step before
            copy_step(i / kStep + 1);
        }
        copy_x();
        if (RT && next_step) {
            copy_wait<(kStages - 1 < kStep ? kStages - 1 : kStep)>();  // it came kStep copies ago
            __syncthreads();
        } else {
            copy_wait<kStages - 1>();
        }
        Fragment x(read);
        read = read == ring + (kStages - 1) * kWarpX ? ring : read + kWarpX;
        if (kPrologue == kGelu) apply_gelu(x);
        if (kPrologue == kModulate)
            apply_modulation(x, p, min(row0 + g, last_row), min(row0 + g + 8, last_row),
                             (first + i) * kGroup + 8 * q);
        if constexpr (RT > 0) {
            const u32 slab = fragment + i / kStep % 2 * kStepBytes + i % kStep * kSlab;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
#pragma unroll
                for (int t = 0; t < RT / 2; ++t) {
                    u32 a[4];
                    load_matrices_transposed(a,
                                             (slab ^ t << 5) + (s / 2 * 32 + s % 2 * 4) * kStride);
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        mma_16bit<T>(sum[t][h], a, x.pair[h][2 * s], x.pair[h][2 * s + 1]);
                }
            }
        }
        if (quantizes) {
            Values values[2];
            values_of(values, x, inverse_smooth + (i * kGroup + 8 * q) * 4, signs);
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                u32 codes[4];
                const float scale = quantize_row(values[h], x.pair[h], codes);
                out.codes(i, odd, h, codes, scale);
            }
            if (kForm == kImage && (i % kChunk == kChunk - 1 || i == count - 1))
                out.chunk((first + i) / kChunk, i % kChunk + 1);
        }
    };

    // A slice begins at an even group, so odd ones are known when this is compiled.
#pragma unroll 1
    for (u32 i = 0; i < count; i += 2) {
        take_group(i, false);
        if (i + 1 < count) take_group(i + 1, true);
    }

    // ---- x . proj_down: of several slices, the warp that finishes last adds them up, in a fixed
    // order
    if constexpr (RT > 0) {
        if (row0 >= (u32)p.m) return;
        if (gridDim.y > 1) {
            const u32 tiles = gridDim.x * warps;
            const u64 slot = (u64)blockIdx.z * gridDim.y * tiles + tile;
            float4* partial = (float4*)p.partial + lane;
            const float4* mine = (const float4*)sum;
#pragma unroll
            for (int n = 0; n < RT; ++n)
                partial[((slot + (u64)blockIdx.y * tiles) * RT + n) * 32] = mine[n];
            __threadfence();
            __syncwarp();
            u32 finished = 0;
            u32* counter = p.counters + blockIdx.z * tiles + tile;
            if (lane == 0) {
                finished = atomicAdd(counter, 1u);
                if (finished == gridDim.y - 1) *counter = 0;  // as the next launch needs it
            }
            finished = __shfl_sync(0xFFFFFFFFu, finished, 0);
            if (finished != gridDim.y - 1) return;
            __threadfence();
            float4 total[kTiles] = {};
#pragma unroll 2
            for (u32 s = 0; s < gridDim.y; ++s)
#pragma unroll
                for (int n = 0; n < RT; ++n) {
                    const float4 v = __ldcg(&partial[((slot + (u64)s * tiles) * RT + n) * 32]);
                    total[n].x += v.x, total[n].y += v.y, total[n].z += v.z, total[n].w += v.w;
                }
            out.down((const Sums&)total, rank0);
            return;
        }
        out.down(sum, rank0);
    }
}
