// From x (M, K): 4-bit codes of x / smooth, their scales, and x . proj_down, reading x once.
//
// The first half of an SVDQuant W4A4 layer. One build of this file is one kernel, shaped by the
// macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// A block takes 32 rows and a slice of the columns; its warps are two half-blocks of 16 rows times
// WARPS_K groups of 64 columns, and step through the slice WARPS_K groups at a time, STAGES steps
// of copies under way. The same 16 bytes of x that a lane copies serve it as what is quantized and
// as its part of the matrix product's left operand, so x never changes lanes. For that the
// product's columns are dealt anew: a product over 16 columns wants four from each lane of a quad
// (lane q = lane % 4), and a lane copies
//
//     chunk 0: columns 8q .. 8q + 7        chunk 1: columns 32 + 8q .. 32 + 8q + 7
//
// of rows g and g + 8 (g = lane / 4), so product s takes columns 32 (s / 2) + 8q + 4 (s % 2) .. +
// 3, and the rows of proj_down are fetched from shared memory in the same order: row j of a
// fragment's half h is 32 (s / 2) + 8 (j / 2) + 4 (s % 2) + 2h + j % 2.
//
// Shared memory:   stage 0 | stage 1 | ... | 1 / smooth for the slice, float32
//         stage:   x: 2 KB a warp, chunk i of lane l at 512 i + 16 l
//                  proj_down: a slab (64 rows of a group) for each pair of warps that share a group
//
// The rows of a slab that one ldmatrix reads differ in row / 8 % 4 and row % 2, which with the
// swizzle below puts them into eight different 16-byte columns:
//
//     stride 64 bytes (up to 32 ranks):  chunk c at c ^ (row / 8 % 4); row % 2 picks the line's
//     half stride 128 bytes (64 ranks):       chunk c at c ^ (row / 8 % 4 + 4 (row % 2))
#include "codes.cuh"
#include "device.cuh"

#ifndef SVDQ_BF16  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_BF16 1
#    define SVDQ_UNSIGNED 0
#    define SVDQ_RANK_TILES 4
#    define SVDQ_PROLOGUE 0
#    define SVDQ_WARPS_K 4
#    define SVDQ_STAGES 3
#endif

namespace {

#if SVDQ_BF16
using T = Bf16;
#else
using T = Fp16;
#endif
constexpr bool kUnsigned = SVDQ_UNSIGNED;
constexpr int RT = SVDQ_RANK_TILES;  // products of 8 ranks each; 0 without a low-rank branch

enum Prologue { kNone = 0, kGelu = 1, kModulate = 2 };
constexpr Prologue kPrologue = (Prologue)SVDQ_PROLOGUE;

constexpr int kWarpsK = SVDQ_WARPS_K, kStages = SVDQ_STAGES;
constexpr int kThreads = 64 * kWarpsK, kBlockRows = 32;
constexpr int kStride = RT > 4 ? 128 : 64;  // bytes of a slab's row
constexpr int kSlab = RT ? kGroup * kStride : 0;
constexpr int kWarpX = 2048;  // a warp's part of a stage
constexpr int kStageBytes = kWarpsK * (2 * kWarpX + kSlab);

struct Arguments {
    const u16* x;          // (M, K)
    const u16* smooth;     // (K,)
    const u16* proj_down;  // (K, rank)
    u8* qact;              // (M, K / 2)
    float* act_scale;      // (K / 64, M)
    float* down;           // (M, rank)
    float* partial;        // (slices, M, rank), where there are several slices
    u32* counters;         // zero, one for each block of rows and ranks
    int m, k, rank, slice_groups;
    // kModulate: x (1 + scale) + shift
    const u16* modulation_scale;  // (M / modulation_rows, K)
    const u16* modulation_shift;
    int modulation_rows;
};

// Where chunk `chunk` of row `row` of a slab lies.
SVDQ_DEVICE u32 slab_offset(int row, int chunk) {
    const int swizzle = row / 8 % 4 + (kStride == 128 ? row % 2 * 4 : 0);
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

SVDQ_DEVICE void apply_modulation(Fragment& x, const Arguments& p, int row0, int row1, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u64 at = (u64)((h ? row1 : row0) / p.modulation_rows) * p.k + column;
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

// Quantizes one row of a fragment; `inverse_smooth` is shared memory with the group's 64 floats
// from this lane's first column on. Every lane of the quad returns the group's scale.
SVDQ_DEVICE float quantize_row(const u32 (&pair)[8], u32 inverse_smooth, u32 (&codes)[2]) {
    float values[16], largest = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 s = load_shared16(inverse_smooth + i / 2 * 128 + i % 2 * 16);
        const u32 first = pair[2 * i], second = pair[2 * i + 1];
        values[4 * i] = smoothed<T, kUnsigned>(T::low(first), as_float(s.x));
        values[4 * i + 1] = smoothed<T, kUnsigned>(T::high(first), as_float(s.y));
        values[4 * i + 2] = smoothed<T, kUnsigned>(T::low(second), as_float(s.z));
        values[4 * i + 3] = smoothed<T, kUnsigned>(T::high(second), as_float(s.w));
    }
#pragma unroll
    for (int i = 0; i < 16; ++i)
        largest = fmaxf(largest, kUnsigned ? values[i] : fabsf(values[i]));
    largest = quad_max(largest);
    if (largest > kFloatMax) {  // x / smooth overflowed
        largest = kFloatMax;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            values[i] = fminf(fmaxf(values[i], -kFloatMax), kFloatMax);
    }
    const float inverse = inverse_scale<kUnsigned>(largest);
    codes[0] = pack_codes<kUnsigned>(values, inverse);
    codes[1] = pack_codes<kUnsigned>(values + 8, inverse);
    return inverse > 0.f ? largest * (kUnsigned ? 1.f / 15.f : 1.f / 7.f) : 0.f;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 512 / kThreads)
    svdq_quantize_int4(const Arguments p) {
    extern __shared__ __align__(128) u8 shared[];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int g = lane / 4, q = lane % 4;
    const int warp_row = warp % 2, warp_k = warp / 2;
    const int pair_thread = tid % 64;  // among the two warps that share a group

    const int first = blockIdx.y * p.slice_groups;
    const int count = min(p.slice_groups, p.k / kGroup - first);
    const int rank0 = blockIdx.z * RT * 8;
    const bool quantizes = blockIdx.z == 0;  // the blocks of further ranks only multiply

    const int row0 = blockIdx.x * kBlockRows + warp_row * 16 + g, row1 = row0 + 8;
    const u16* x0 = p.x + (u64)min(row0, p.m - 1) * p.k;
    const u16* x1 = p.x + (u64)min(row1, p.m - 1) * p.k;

    const u32 stages = shared_address(shared);
    const u32 lane_x = stages + warp * kWarpX + lane * 16;
    const u32 slabs = stages + 2 * kWarpsK * kWarpX + warp_k * kSlab;
    float* inverse_smooth = (float*)(shared + kStages * kStageBytes);

    // Where this thread's next copies come from. Of proj_down it copies one chunk of rows 64 / RT
    // apart.
    constexpr int kRowStep = 64 / (RT ? RT : 1);
    const int slab_row = pair_thread / (RT ? RT : 1), slab_chunk = pair_thread % (RT ? RT : 1);
    const bool rank_exists = rank0 + slab_chunk * 8 < p.rank;
    const int first_column = (first + warp_k) * kGroup;
    const u16* from_x0 = x0 + first_column + 8 * q;
    const u16* from_x1 = x1 + first_column + 8 * q;
    const u16* from_slab =
        p.proj_down + (u64)(first_column + slab_row) * p.rank + rank0 + slab_chunk * 8;
    int left = (count - warp_k + kWarpsK - 1) / kWarpsK;  // steps of this warp not yet copied

    auto load_stage = [&](u32 stage) {
        if (left-- > 0) {
#pragma unroll
            for (int c = 0; c < 4; ++c)
                copy_or_zero<16>(lane_x + stage + 512 * c, (c < 2 ? from_x0 : from_x1) + c % 2 * 32,
                                 true);
#pragma unroll
            for (int i = 0; i < RT; ++i)
                copy_or_zero<16>(slabs + stage + slab_offset(slab_row + i * kRowStep, slab_chunk),
                                 from_slab + (u32)(i * kRowStep) * p.rank, rank_exists);
            from_x0 += kWarpsK * kGroup;
            from_x1 += kWarpsK * kGroup;
            from_slab += (u32)(kWarpsK * kGroup) * p.rank;
        }
        copy_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s)
        load_stage(s * kStageBytes);
    for (int i = tid; i < count * kGroup / 2; i += kThreads) {
        const u32 pair = ((const u32*)(p.smooth + first * kGroup))[i];
        inverse_smooth[2 * i] = reciprocal(T::low(pair));
        inverse_smooth[2 * i + 1] = reciprocal(T::high(pair));
    }
    __syncthreads();

    float acc[RT ? RT : 1][4] = {};
    // Fragment rows of products s: 32 (s / 2) + 4 (s % 2) rows on from these, which leaves the
    // swizzle as it is; chunks n on flip bits of the chunk's number.
    const u32 fragment =
        slabs + slab_offset(lane % 8 / 2 * 8 + lane / 8 % 2 * 2 + lane % 2, lane / 16);
    u32* to_codes0 = (u32*)(p.qact + ((u64)row0 * p.k + first_column) / 2) + q;
    u32* to_codes1 = (u32*)(p.qact + ((u64)row1 * p.k + first_column) / 2) + q;
    float* to_scale = p.act_scale + (u64)(first + warp_k) * p.m;

    // The stage in use; the one before it in the ring, used last time, is filled again.
    u32 read = 0;
#pragma unroll 1
    for (int i = warp_k; i - warp_k < count; i += kWarpsK) {
        copy_wait<kStages - 2>();
        if (RT) __syncthreads();  // every warp takes every step, with or without a group of its own
        load_stage(read ? read - kStageBytes : (kStages - 1) * kStageBytes);
        if (i >= count) continue;
        Fragment x(lane_x + read);

        if (kPrologue == kGelu) apply_gelu(x);
        if (kPrologue == kModulate)
            apply_modulation(x, p, min(row0, p.m - 1), min(row1, p.m - 1),
                             (first + i) * kGroup + 8 * q);

        if (quantizes) {
            const u32 smooth = shared_address(inverse_smooth + i * kGroup + 8 * q);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 codes[2];
                const float scale = quantize_row(x.pair[h], smooth, codes);
                const int row = h ? row1 : row0;
                if (row < p.m) {
                    u32* to = h ? to_codes1 : to_codes0;
                    to[0] = codes[0];
                    to[4] = codes[1];
                    if (q == 0) to_scale[row] = scale;
                }
            }
            to_codes0 += kWarpsK * kGroup / 8;
            to_codes1 += kWarpsK * kGroup / 8;
            to_scale += (u64)kWarpsK * p.m;
        }
        if constexpr (RT > 0) {
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const u32 a[4] = {x.pair[0][2 * s], x.pair[1][2 * s], x.pair[0][2 * s + 1],
                                  x.pair[1][2 * s + 1]};
#pragma unroll
                for (int n = 0; n < RT; n += 2) {
                    u32 b[4];
                    load_matrices_transposed(
                        b, (fragment ^ n << 4) + read + (s / 2 * 32 + s % 2 * 4) * kStride);
                    mma_16bit<T>(acc[n], a, b[0], b[1]);
                    mma_16bit<T>(acc[n + 1], a, b[2], b[3]);
                }
            }
        }
        read = read == (kStages - 1) * kStageBytes ? 0 : read + kStageBytes;
    }

    // ---- x . proj_down: the sum over the four warps that share rows, in a fixed order
    if constexpr (RT > 0) {
        constexpr int kRanks = RT * 8;
        __syncthreads();
        constexpr int kPitch = kRanks + 8;  // spreads a fragment's rows over the banks
        float* sums = (float*)shared;       // (kWarpsK, kBlockRows, kPitch)
#pragma unroll
        for (int n = 0; n < RT; ++n) {
            float* to = sums + (warp_k * kBlockRows + warp_row * 16 + g) * kPitch + n * 8 + 2 * q;
            *(float2*)to = make_float2(acc[n][0], acc[n][1]);
            *(float2*)(to + 8 * kPitch) = make_float2(acc[n][2], acc[n][3]);
        }
        __syncthreads();
        float* out = gridDim.y == 1 ? p.down : p.partial + (u64)blockIdx.y * p.m * p.rank;
        for (int i = tid; i < kBlockRows * kRanks; i += kThreads) {
            const int row = blockIdx.x * kBlockRows + i / kRanks, rank = rank0 + i % kRanks;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarpsK; ++w)
                sum += sums[(w * kBlockRows + i / kRanks) * kPitch + i % kRanks];
            if (row < p.m && rank < p.rank)
                out[(u64)row * p.rank + rank] = fminf(fmaxf(sum, -kFloatMax), kFloatMax);
        }

        // Of several slices, the block that finishes last adds them up, again in a fixed order.
        if (gridDim.y > 1) {
            __shared__ bool last;
            __threadfence();
            __syncthreads();
            if (tid == 0) {
                u32* counter = p.counters + blockIdx.z * gridDim.x + blockIdx.x;
                last = atomicAdd(counter, 1u) == gridDim.y - 1;
                if (last) *counter = 0;  // as the next launch needs it
            }
            __syncthreads();
            if (!last) return;
            __threadfence();
            for (int i = tid; i < kBlockRows * kRanks; i += kThreads) {
                const int row = blockIdx.x * kBlockRows + i / kRanks, rank = rank0 + i % kRanks;
                if (row >= p.m || rank >= p.rank) continue;
                const u64 at = (u64)row * p.rank + rank;
                float sum = 0.f;
                for (int s = 0; s < gridDim.y; ++s)
                    sum += __ldcg(p.partial + (u64)s * p.m * p.rank + at);
                p.down[at] = fminf(fmaxf(sum, -kFloatMax), kFloatMax);
            }
        }
    }
}
