// int8 codes of x (M, K), smoothed and rotated, with one scale a row: on sm_90a only
//
//     r = rotation, in groups of 64, of x * inverse           (both roundings to x's type)
//     qact[m, k] = round(r[m, k] / act_scale[m]),   act_scale[m] = largest |r| of the row / 127
//
// It is the first half of a 4-bit layer evaluated in 8 bits; gemm_ungrouped.cu is the second.
//
// A row's scale is known at its end, when most of the row would have left the chip. So a cluster of
// blocks holds 16 whole rows, each block a part of the columns in its shared memory:
//
//               block 0                      block 1
//           +-------+-------+-------+- . . +-------+- . .
//   16 rows | group | group | group |      | group |       a group: 64 columns, that is
//           +-------+-------+-------+- . . +-------+- . .  128 bytes of each row, and a barrier
//             warp 0  warp 1  warp 2         warp 0        that counts them as they come
//
//   1. All copies are started at once. A warp takes a group as it arrives, and puts r in x's place.
//   2. The blocks of the cluster tell each other the largest |r| of each row.
//   3. Each warp encodes what it had.
//
// Shared memory:   groups, 2 KB each | rows' largest: this block's, each one's | factors | barriers
//
// A lane (g = lane / 4, q = lane % 4) has columns 16 q + 0 .. 15 of rows g and g + 8: two 16-byte
// chunks of each, which the copies' swizzle puts where a quarter of a warp meets no bank twice.
#include "hopper.cuh"
#include "rotation.cuh"

#ifndef SVDQ_CLUSTER  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_CLUSTER 4
#endif

namespace {

constexpr u32 kCluster = SVDQ_CLUSTER, kMostThreads = 256;
constexpr u32 kRows = 16, kGroupBytes = kRows * 128;
constexpr float kLargestCode = 127.f;

struct Arguments {
    TensorMap x;         // (M, K), boxes of 16 rows by 64 columns
    const u16* inverse;  // (K,) 1 / smooth_factor
    u8* qact;            // (M, K)
    float* act_scale;    // (M,)
    int m, k;
    int block_groups;  // of a block's part of the columns
};

struct Shared {
    u32 base, groups;

    SVDQ_DEVICE u32 group(u32 i) const {
        return base + i * kGroupBytes;
    }
    SVDQ_DEVICE u32 largest() const {
        return group(groups);
    }
    SVDQ_DEVICE u32 of_block(u32 block) const {
        return largest() + (1 + block) * kRows * 4;
    }
    SVDQ_DEVICE u32 factors() const {
        return of_block(kCluster);
    }
    SVDQ_DEVICE u32 told() const {
        return factors() + kRows * 4;
    }
    SVDQ_DEVICE u32 full(u32 i) const {
        return told() + 8 + i * 8;
    }
};

// Where chunk i of a lane's share of 16 rows lies; chunks 2 and 3 are of row g + 8.
SVDQ_DEVICE u32 chunk(u32 rows, u32 g, u32 q, u32 i) {
    return rows + (g + i / 2 * 8) * 128 + (((2 * q + i % 2) ^ g) << 4);
}

SVDQ_DEVICE void load(Pairs& pair, u32 rows, u32 g, u32 q) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const uint4 v = load_shared16(chunk(rows, g, q, i));
        u32* to = &pair[i / 2][i % 2 * 4];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
}

// A lane's share of 16 rows of a group, smoothed and rotated, over 8. Returns false where that
// overflows, in which case smoothed values need to be clamped.
SVDQ_DEVICE bool rotated(Pairs& pair, u32 rows, const u16* inverse, u32 g, u32 q,
                         const Signs& signs, bool clamp) {
    Pairs smoothed;
    load(smoothed, rows, g, q);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 v = ((const uint4*)inverse)[i];
        const u32 factors[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            u32& x = smoothed[j / 4][4 * i + j % 4];
            x = T::multiply(x, factors[j % 4]);
            if (clamp) x = T::pack(saturate<T>(T::low(x)), saturate<T>(T::high(x)));
        }
    }
    bool finite = true;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float half[2][4][2];
        finite &= rotate_half(half, smoothed, signs, n);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pair[i / 4][i % 4 * 2 + n] = T::pack(half[i / 4][i % 4][0], half[i / 4][i % 4][1]);
    }
    return __all_sync(0xFFFFFFFFu, finite);
}

// The larger magnitude of a row's pairs, in 16 bits.
SVDQ_DEVICE u32 largest_of(const u32 (&pair)[8]) {
    u32 top = T::magnitudes(pair[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i)
        top = T::larger(top, T::magnitudes(pair[i]));
    return T::larger(top, top >> 16 | top << 16);
}

// Eight values to codes. Adding 12582912 rounds to an integer in a float's low bits.
SVDQ_DEVICE uint2 encode(const u32* pair, float factor) {
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 bits[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 v = pair[2 * i + j / 2];
            bits[j] = as_bits(fmaf(j % 2 ? T::high(v) : T::low(v), factor, 12582912.f));
        }
        words[i] = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040),
                               __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
    }
    return make_uint2(words[0], words[1]);
}

}  // namespace

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kMostThreads, 3)
    svdq_quantize_rows(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 g = lane / 4, q = lane % 4;
    const u32 part = blockIdx.x % kCluster, row0 = blockIdx.x / kCluster * kRows;
    const int first = part * p.block_groups;
    const int count = max(min(p.block_groups, p.k / kGroup - first), 0);
    const Shared shared{shared_address(memory), (u32)p.block_groups};

    let_next_kernel_start();
    // Each warp starts the copies that it will wait for.
    if (lane == 0) {
#pragma unroll 1
        for (int i = warp; i < count; i += warps)
            barrier_init(shared.full(i), 1);
        if (warp == 0) {
            barrier_init(shared.told(), 1);
            barrier_expect(shared.told(), kCluster * kRows * 4);
        }
        fence_barrier_init();
#pragma unroll 1
        for (int i = warp; i < count; i += warps) {
            barrier_expect(shared.full(i), kGroupBytes);
            tensor_load(shared.group(i), p.x, (first + i) * 128, row0, shared.full(i));
        }
    }
    if (threadIdx.x < kRows) store_shared4(shared.largest() + threadIdx.x * 4, 0);
    cluster_arrive();
    __syncthreads();

    const Signs signs(g, q);
    u32 top = 0;  // of row g in the low half, of g + 8 in the high one
#pragma unroll 1
    for (int i = warp; i < count; i += warps) {
        const u16* inverse = p.inverse + (first + i) * kGroup + 16 * q;
        const u32 rows = shared.group(i);
        barrier_wait(shared.full(i), 0);
        Pairs pair;
        bool clamp = false;
        while (!rotated(pair, rows, inverse, g, q, signs, clamp) && !clamp)
            clamp = true;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32* v = &pair[j / 2][j % 2 * 4];
            store_shared16(chunk(rows, g, q, j), v[0], v[1], v[2], v[3]);
        }
        top = T::larger(top, __byte_perm(largest_of(pair[0]), largest_of(pair[1]), 0x5410));
    }
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2)
        top = T::larger(top, __shfl_xor_sync(0xFFFFFFFFu, top, mask));
    if (q < 2)
        shared_maximum(shared.largest() + (g + 8 * q) * 4, as_bits(q ? T::high(top) : T::low(top)));
    cluster_wait();  // every block's barriers are there
    __syncthreads();

    if (threadIdx.x < kCluster * kRows / 4) {
        const u32 block = threadIdx.x / (kRows / 4), four = threadIdx.x % (kRows / 4) * 16;
        store_shared16_at(shared.of_block(part) + four, load_shared16(shared.largest() + four),
                          shared.told(), block);
    }
    if (threadIdx.x < kRows) {
        const u32 row = row0 + threadIdx.x;
        barrier_wait(shared.told(), 0);
        float largest = 0.f;
#pragma unroll
        for (u32 block = 0; block < kCluster; ++block)
            largest =
                fmaxf(largest, as_float(load_shared4(shared.of_block(block) + threadIdx.x * 4)));
        // Below this the reciprocal overflows; such a row is zero for all purposes.
        const bool zero = !(largest > kFloatTiny * kLargestCode);
        store_shared4(shared.factors() + threadIdx.x * 4,
                      zero ? 0 : as_bits(__fdiv_rn(kLargestCode, largest)));
        if (part == 0 && row < (u32)p.m)
            p.act_scale[row] = zero ? 0.f : fminf(largest * (8.f / kLargestCode), kFloatMax);
    }
    __syncthreads();

#pragma unroll 1
    for (int i = warp; i < count; i += warps) {
        const u32 rows = shared.group(i);
        Pairs pair;
        load(pair, rows, g, q);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            const u32 row = g + 8 * h;
            const float factor = as_float(load_shared4(shared.factors() + row * 4));
            const uint2 low = encode(pair[h], factor), high = encode(pair[h] + 4, factor);
            if (row0 + row < (u32)p.m)
                *(uint4*)(p.qact + (u64)(row0 + row) * p.k + (first + i) * kGroup + 16 * q) =
                    make_uint4(low.x, low.y, high.x, high.y);
        }
    }
}
