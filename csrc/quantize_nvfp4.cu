// From x (M, K): E2M1 codes of x / smooth, their E4M3 scales, and x . proj_down, reading x once.
//
// The first half of an SVDQuant layer in NVFP4. One build of this file is one kernel, shaped by the
// macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// As in quantize_int4.cu a warp takes 16 rows and a slice of the columns, block of 64 after block;
// warps of a block lie above each other, over the same slice. Of a block of 64, lane q = lane % 4
// of a quad owns columns 16q .. 16q + 15 of rows g and g + 8 (g = lane / 4): one group of each row,
// so scales and codes are made without asking a neighbour. The same registers are the right operand
// of the product proj_down^T . x^T. It wants four columns from each lane of a quad for 16 of its
// own, and any order will do if both operands have it: product s takes columns 16q + 4s .. + 3, and
// row j of half h of the other operand's fragment is 16 (j / 2) + 4 s + 2 h + j % 2.
//
// x comes through shared memory, STAGES - 1 blocks ahead of its use, and is copied in pieces that
// suit the memory, 64 bytes a quad, not the lane that owns it: 16-byte chunk c of row r lies at
// c ^ (r % 8), and all accesses are free of bank conflicts. proj_down comes a step of a few slabs
// (64 rows) at a time, two steps in turn, for the whole block.
//
// Shared memory:   step 0 | step 1 | x: for each warp STAGES times (16 rows, 128 bytes)
//                  | 1 / smooth, float32: of each 64, columns 16q + 4j .. + 3 at 4j + q
//
// With OUTPUT 1 (wide), for a product in 16 bits, what codes and scales stand for is written as
// fp16, which holds it exactly, with each 64 columns in the order of the products above:
//
//     position 16 s + 2 q + 8 h + e    holds column 16 q + 4 s + 2 h + e
//
// so the quad's lanes exchange pairs, through the shared memory that their x has left.
//
// With OUTPUT 2 nothing is quantized yet: what a format with a scale for each row has to know first
// (quantize_int8.cu) is the largest magnitude of each row, and each slice gives its own.
#include "nvfp4.cuh"

#ifndef SVDQ_RANK_TILES  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_RANK_TILES 4
#    define SVDQ_STAGES 3
#    define SVDQ_MOST_WARPS 20
#    define SVDQ_OUTPUT 0
#endif

namespace {

constexpr bool kWide = SVDQ_OUTPUT == 1, kAbsmax = SVDQ_OUTPUT == 2;
constexpr int RT = SVDQ_RANK_TILES;  // products of 8 ranks each; 0 without a low-rank branch

constexpr int kBlock = 64;  // columns
constexpr int kMostThreads = SVDQ_MOST_WARPS * 32, kRows = 16, kStages = SVDQ_STAGES;
constexpr int kStep = RT > 4 ? 2 : 4;  // slabs that come at once
constexpr int kTiles = RT ? RT : 1;
constexpr int kStride = RT > 4 ? 128 : 64;  // bytes of a slab's row
constexpr u32 kSlab = RT ? kBlock * kStride : 0;
constexpr u32 kStepBytes = kStep * kSlab;
constexpr u32 kWarpX = kRows * kBlock * 2;  // a warp's part of a stage

// A lane's part of x . proj_down: of ranks 16 t + g (element 0, 1) and 16 t + g + 8 (2, 3), rows
// 8 h + 2 q (0, 2) and + 1 (1, 3), t the first index and h the second.
using Sums = float[RT ? RT / 2 : 1][2][4];

struct Arguments {
    const u16* x;          // (M, K)
    const u16* smooth;     // (K,)
    const u16* proj_down;  // (K, rank)
    void* values;          // (M, K / 2) codes; wide: (M, K) fp16; largest: (slices, M) float32
    u8* scale;             // (K / 64, M, 4) E4M3; codes only
    u16* down;             // (M, padded_rank), as x; zeros from rank on
    float* down_scale;     // (M,) powers of two; fp16 only
    float* partial;        // sums of each slice and block of ranks, as a warp's lanes hold them
    u32* counters;         // zero, one for each 16 rows
    int m, k, rank, padded_rank, slice_blocks;
};

// Where chunk `chunk` of row `row` of a slab lies: the rows that one ldmatrix reads differ in
// row / 16 % 4 and row % 2, and so in their 16-byte column.
SVDQ_DEVICE u32 slab_offset(u32 row, u32 chunk) {
    const u32 swizzle = row / 16 % 4 + (kStride == 128 ? row % 2 * 4 : 0);
    return row * kStride + ((chunk ^ swizzle) << 4);
}

// The finished sums: to 16 bits, and into the range of fp16 by a power of two for each row.
// `load(sum, block)` gives those of a block of RT * 8 ranks.
template <class Load>
SVDQ_DEVICE void write_down(const Arguments& p, u32 row0, u32 blocks, Load load) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float scale[2][2] = {{1.f, 1.f}, {1.f, 1.f}};
    Sums sum;
    bool loaded = false;
    if (!T::kIsBf16) {
        float largest[2][2] = {};
        for (u32 block = 0; block < blocks; ++block) {
            load(sum, block);
#pragma unroll
            for (int i = 0; i < RT * 4; ++i) {
                float& of_row = largest[i / 4 % 2][i % 2];
                of_row = fmaxf(of_row, fabsf(sum[i / 8][i / 4 % 2][i % 4]));
            }
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            float& of_row = largest[i / 2][i % 2];
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2)
                of_row = fmaxf(of_row, shuffle_xor(of_row, mask));
            scale[i / 2][i % 2] = down_power(of_row);
            const u32 row = row0 + 8 * (i / 2) + 2 * q + i % 2;
            if (g == 0 && row < (u32)p.m) p.down_scale[row] = 1.f / scale[i / 2][i % 2];
        }
        loaded = RT <= 4 && blocks == 1;  // more would not stay in registers
    }
    for (u32 block = 0; block < blocks; ++block) {
        if (!loaded) load(sum, block);
#pragma unroll
        for (int i = 0; i < RT * 4; ++i) {
            const u32 h = i / 4 % 2, e = i % 2, row = row0 + 8 * h + 2 * q + e;
            const u32 rank = (block * RT + i / 8 * 2 + i % 4 / 2) * 8 + g;
            const float value = sum[i / 8][h][i % 4] * scale[h][e];
            if (row < (u32)p.m)
                p.down[(u64)row * p.padded_rank + rank] = (u16)pack_down<T>(value, 0.f);
        }
    }
    const u32 row = row0 + lane / 2;
    if (row < (u32)p.m)
        for (u32 rank = (blocks * RT + lane % 2) * 8; rank < (u32)p.padded_rank; rank += 16)
            *(uint4*)(p.down + (u64)row * p.padded_rank + rank) = make_uint4(0, 0, 0, 0);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kMostThreads, 1)
    svdq_quantize_nvfp4(const Arguments p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 g = lane / 4, q = lane % 4;
    const u32 first = blockIdx.y * p.slice_blocks;
    const u32 count = min(p.slice_blocks, p.k / kBlock - (int)first);
    const bool quantizes = blockIdx.z == 0;  // the blocks of further ranks only multiply
    let_next_kernel_start();

    const u32 tile = blockIdx.x * warps + warp, row0 = tile * kRows;
    const u32 rows[2] = {row0 + g, row0 + g + 8};
    // Of rows g and g + 8 a lane moves this chunk and the one 4 from it.
    const u32 chunk = q + g % 2 * 4;
    const u64 start = (u64)first * kBlock;
    const u16* x0 = p.x + (u64)min(rows[0], (u32)p.m - 1) * p.k + start;
    const u16* x1 = p.x + (u64)min(rows[1], (u32)p.m - 1) * p.k + start;

    const u32 slabs = shared_address(memory);
    const u32 ring = slabs + 2 * kStepBytes + warp * kStages * kWarpX;
    const u32 inverse_smooth = slabs + 2 * kStepBytes + warps * kStages * kWarpX;
    const u32 moved = g * 128 + ((chunk ^ g) << 4), owned = g * 128 + ((2 * q ^ g) << 4);

    u32 filled = 0, write = ring, read = ring;
    auto copy_x = [&] {  // the next block's
        if (filled++ < count) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                copy_or_zero<16>(write + (moved ^ i << 6), x0 + (chunk ^ i << 2) * 8, true);
                copy_or_zero<16>(write + (moved ^ i << 6) + 1024, x1 + (chunk ^ i << 2) * 8, true);
            }
            x0 += kBlock;
            x1 += kBlock;
            write = write == ring + (kStages - 1) * kWarpX ? ring : write + kWarpX;
        }
        copy_commit();
    };
    auto copy_step = [&](u32 step) {
        if constexpr (RT > 0) {
            const u32 to = slabs + step % 2 * kStepBytes, rank0 = blockIdx.z * RT * 8;
            const int blocks = min(kStep, (int)(count - step * kStep));
            const u16* from = p.proj_down + (start + step * kStep * kBlock) * p.rank + rank0;
            for (int i = threadIdx.x; i < blocks * kBlock * RT; i += blockDim.x) {
                const u32 row = (u32)i / kTiles, chunk = (u32)i % kTiles;
                copy_or_zero<16>(to + row / kBlock * kSlab + slab_offset(row % kBlock, chunk),
                                 from + (u64)row * p.rank + chunk * 8, rank0 + chunk * 8 < p.rank);
            }
        }
    };

    copy_step(0);
    copy_step(1);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i)
        copy_x();
    for (u32 i = threadIdx.x; i < count * kBlock / 4; i += blockDim.x) {
        const uint2 v = ((const uint2*)(p.smooth + start))[i];
        const u32 at = i / 16 * 16 + i % 4 * 4 + i / 4 % 4;
        store_shared8(inverse_smooth + at * 16, as_bits(1.f / T::low(v.x)),
                      as_bits(1.f / T::high(v.x)));
        store_shared8(inverse_smooth + at * 16 + 8, as_bits(1.f / T::low(v.y)),
                      as_bits(1.f / T::high(v.y)));
    }
    __syncthreads();

    Sums sum = {};
    float largest[2] = {};
    // Fragment rows of product s: 4 s rows on from these, which leaves the swizzle as it is; chunks
    // 2 t on flip bits of the chunk's number.
    const u32 fragment =
        slabs + slab_offset(lane % 8 / 2 * 16 + lane / 16 * 2 + lane % 2, lane / 8 % 2);

#pragma unroll 1
    for (u32 i = 0; i < count; ++i) {
        const bool next_step = i % kStep == 0;
        if (RT && next_step && i) {
            __syncthreads();  // everyone is done with the step before
            copy_step(i / kStep + 1);
        }
        __syncwarp();  // and with the stage before
        copy_x();
        if (RT && next_step) {
            copy_wait<(kStages - 1 < kStep ? kStages - 1 : kStep)>();  // it came kStep copies ago
            __syncthreads();
        } else {
            copy_wait<kStages - 1>();
            __syncwarp();
        }
        u32 pairs[2][8];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const uint4 v = load_shared16(read + (owned ^ j % 2 << 4) + j / 2 * 1024);
            u32* to = &pairs[j / 2][j % 2 * 4];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        if constexpr (RT > 0) {
            const u32 slab = fragment + i / kStep % 2 * kStepBytes + i % kStep * kSlab;
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int t = 0; t < RT / 2; ++t) {
                    u32 a[4];
                    load_matrices_transposed(a, (slab ^ t << 5) + s * 4 * kStride);
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        mma_16bit<T>(sum[t][h], a, pairs[h][2 * s], pairs[h][2 * s + 1]);
                }
        }
        if (quantizes) {
            float inverse_of[16];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const uint4 v = load_shared16(inverse_smooth + (i * 16 + j * 4 + q) * 16);
                inverse_of[4 * j] = as_float(v.x), inverse_of[4 * j + 1] = as_float(v.y);
                inverse_of[4 * j + 2] = as_float(v.z), inverse_of[4 * j + 3] = as_float(v.w);
            }
            if (kWide) __syncwarp();  // the quad has read what it now overwrites
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                if constexpr (kAbsmax) {
                    float part[4] = {largest[h]};
#pragma unroll
                    for (int c = 0; c < 16; ++c) {
                        const u32 pair = pairs[h][c / 2];
                        const float value = (c % 2 ? T::high(pair) : T::low(pair)) * inverse_of[c];
                        part[c % 4] = fmaxf(part[c % 4], fabsf(value));
                    }
                    largest[h] = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
                    continue;
                }
                float steps[16];
                const u32 code = scale_group<T>(pairs[h], inverse_of, steps);
                if constexpr (kWide) {
                    const u32 scale = multiply_pairs(code << 7 | code << 23, 0x5C005C00u);  // 2^8
#pragma unroll
                    for (u32 c = 0; c < 8; ++c) {
                        const float* pair = steps + 2 * c;
                        float low, high;
                        const float sum_low = e2m1_round(pair[0], low);
                        const float sum_high = e2m1_round(pair[1], high);
                        const u32 values =
                            multiply_pairs(Fp16::pack(sum_low - low, sum_high - high), scale);
                        const u32 signs =
                            __byte_perm(as_bits(pair[0]), as_bits(pair[1]), 0x7030) & 0x80008000u;
                        store_shared4(read + h * 1024 + (g * 128 + ((c ^ g) << 4)) + 4 * q,
                                      values | signs);
                    }
                } else if (rows[h] < (u32)p.m) {
                    u8* codes = (u8*)p.values + ((u64)rows[h] * p.k + start) / 2;
                    *(uint2*)(codes + i * (kBlock / 2) + q * 8) =
                        code ? make_uint2(e2m1_codes(steps), e2m1_codes(steps + 8))
                             : make_uint2(0, 0);
                    p.scale[((u64)(first + i) * p.m + rows[h]) * 4 + q] = (u8)code;
                }
            }
            if constexpr (kWide) {
                __syncwarp();
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    const u32 h = j / 2, c = chunk ^ j % 2 << 2;
                    const uint4 v = load_shared16(read + (moved ^ j % 2 << 6) + h * 1024);
                    uint4* to =
                        (uint4*)p.values + ((u64)rows[h] * p.k + start + i * kBlock) / 8 + c;
                    if (rows[h] < (u32)p.m) *to = v;
                }
            }
        }
        read = read == ring + (kStages - 1) * kWarpX ? ring : read + kWarpX;
    }

    if (kAbsmax && quantizes) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            const float row = quad_max(fminf(largest[h], kFloatMax));
            if (q == 0 && rows[h] < (u32)p.m)
                ((float*)p.values)[(u64)blockIdx.y * p.m + rows[h]] = row;
        }
    }

    // ---- x . proj_down: of several slices and blocks of ranks, the warp that finishes last adds
    // them up, in a fixed order
    if constexpr (RT > 0) {
        if (row0 >= (u32)p.m) return;
        const u32 parts = gridDim.y * gridDim.z;
        if (parts == 1) {
            write_down(p, row0, 1, [&](Sums& total, u32) {
#pragma unroll
                for (int i = 0; i < RT * 4; ++i)
                    (&total[0][0][0])[i] = (&sum[0][0][0])[i];
            });
            return;
        }
        const u32 tiles = gridDim.x * warps;
        float4* partial = (float4*)p.partial + lane;
        const float4* mine = (const float4*)sum;
#pragma unroll
        for (int n = 0; n < RT; ++n)
            partial[(((u64)blockIdx.y * gridDim.z + blockIdx.z) * tiles + tile) * RT * 32 +
                    n * 32] = mine[n];
        __threadfence();
        __syncwarp();
        u32 finished = 0;
        if (lane == 0) {
            finished = atomicAdd(p.counters + tile, 1u);
            if (finished == parts - 1) p.counters[tile] = 0;  // as the next launch needs it
        }
        if (__shfl_sync(0xFFFFFFFFu, finished, 0) != parts - 1) return;
        __threadfence();
        write_down(p, row0, gridDim.z, [&](Sums& total, u32 block) {
            float4* to = (float4*)total;
#pragma unroll
            for (int n = 0; n < RT; ++n)
                to[n] = make_float4(0, 0, 0, 0);
            for (u32 s = 0; s < gridDim.y; ++s)
#pragma unroll
                for (int n = 0; n < RT; ++n) {
                    const float4 v = __ldcg(
                        &partial[(((u64)s * gridDim.z + block) * tiles + tile) * RT * 32 + n * 32]);
                    to[n].x += v.x, to[n].y += v.y, to[n].z += v.z, to[n].w += v.w;
                }
        });
    }
}
