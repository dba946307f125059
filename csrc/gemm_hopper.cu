// y = sum over groups g of  act_scale[g, m] * weight_scale[g, n] * (qact . weight over the group)
//     + down . proj_up^T + bias                                                   on sm_90a only
//
// Hopper has no 4-bit product. Its FP8 product is twice as fast as the 16-bit one, and 4-bit codes
// are exact in E4M3, so this kernel multiplies codes held as bytes. One build of this file is one
// kernel, shaped by the macros below; svdq_core/kernels/hopper.py makes its operands.
//
// What decides its speed is not the products but what comes after each group of 64: its sums have
// to be scaled by row and by column before the next group's may join them, which costs instructions
// and, to have the scales where they are needed, shared memory's bandwidth. So:
//
// 1. The products' sums are fp16, two to a register. Whole numbers up to 2048 are exact in fp16,
//    beyond it they round at the eleventh bit (the largest sum is 3136, or 6720 unsigned).
// 2. The two scales are fp16 pairs too, each a part of a larger scale taken out of it: a row's is
//    relative to its row's largest, a column's to its column's.
//        acc = fma(sum, row_scale * column_scale, acc)
//    costs two packed instructions for two outputs. What was taken out multiplies the finished sum.
// 3. A warpgroup computes 128 x BN outputs, two halves of 64 rows above each other, so that column
//    scales, once fetched from shared memory, serve four rows of a thread. While one half is scaled
//    the other one's products run.
//
// acc in fp16 rounds once a group: an error that grows with the root of K / 64, 1e-3 of the result
// at K = 3072. After every kSegment stages it is therefore parked in global memory, and the
// segments are added in float32 at the end.
//
// Activation codes lie in E4M3's subnormal range, where a byte b is worth b * 2^-9 (up to 15): a
// code's byte is its magnitude and its sign bit, and needs no conversion when it is quantized.
//
// A block runs over the output, tile by tile of 256 x BN. The first warpgroup copies (one thread
// does), the other two compute.
//
//   stage (one of three):  256 rows of 128 bytes of qact  |  BN of weight  |  scales of both
//   operands' images:       [K / 128][rows][128 bytes]: what a stage takes is contiguous, and
//                           swizzled as the products read it (hopper.cuh, operand())
//   the low-rank branch:    [rank / 64][rows][64 of 16 bits]: one more stage for 64 ranks
#define SVDQ_COLUMNS 160  // of a product
#include "hopper.cuh"

namespace {

constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int BM = 128 * kConsumers, BN = SVDQ_COLUMNS, kStages = 3;
constexpr int kChunkStages = 4;                // stages with a common chunk_scale
constexpr int kSegment = SVDQ_BF16 ? 64 : 24;  // stages whose sum is one of fp16
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kPairs = BN / 4;  // registers of a thread with its 64 x BN / 128 sums in fp16

constexpr u32 kBytesA = BM * 128, kBytesB = BN * 128;
constexpr u32 kBytesRowScales = BM * 8, kBytesColumnScales = BN * 4;
constexpr u32 kStageBytes =
    (kBytesA + kBytesB + kBytesRowScales + kBytesColumnScales + 1023) / 1024 * 1024;
constexpr u32 kPitch = BN * 2 + 16;  // of a row of outputs on its way through shared memory
constexpr u32 kOutputBytes = 64 * kPitch;
constexpr u32 kColumnBytes = BN * 8;  // of a tile's columns: scale and bias, float32

struct Arguments {
    const u8* qact;             // (K / 128, padded M, 128)
    const u32* act_scale;       // (K / 128, padded M, 2) pairs of twice the same
    const float* chunk_scale;   // (K / 512, padded M)
    const u16* down;            // (rank / 64, padded M, 64)
    const float* down_scale;    // (rank / 64, padded M); fp16 only
    const u8* weight;           // (K / 128, padded N, 128)
    const u32* weight_scale;    // (K / 128, padded N / 32, 2 groups, 4, 4) pairs of columns
    const float* column_scale;  // (padded N,)
    const u16* proj_up;         // (rank / 64, padded N, 64)
    const float* up_scale;      // (1,); fp16 only
    const u16* bias;            // (N,) or null
    u16* out;                   // (M, N)
    int m, n, stages, rank;     // stages of 128 columns
    int padded_m, padded_n;
    uint4* parked;  // (segments - 1, blocks, 20, 256)
};

struct Shared {
    u32 base;

    SVDQ_DEVICE u32 stage(u32 slot) const {
        return base + slot * kStageBytes;
    }
    SVDQ_DEVICE u32 output(u32 consumer) const {
        return base + kStages * kStageBytes + consumer * kOutputBytes;
    }
    SVDQ_DEVICE u32 columns(u32 consumer) const {
        return output(kConsumers) + consumer * kColumnBytes;
    }
    SVDQ_DEVICE u32 top(u32 buffer) const {
        return columns(kConsumers) + buffer * BM * 4;
    }
    SVDQ_DEVICE u32 full(u32 slot) const {
        return top(2) + slot * 8;
    }
    SVDQ_DEVICE u32 empty(u32 slot) const {
        return full(kStages) + slot * 8;
    }
    SVDQ_DEVICE u32 top_full(u32 buffer) const {
        return empty(kStages) + buffer * 8;
    }
    SVDQ_DEVICE u32 top_empty(u32 buffer) const {
        return top_full(2) + buffer * 8;
    }
};

SVDQ_DEVICE void produce(const Arguments& p, const Shared& shared, int tiles_m, int tiles) {
    Ring<kStages> ring;
    const int rank_stages = (p.rank + 63) / 64;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u64 row = (u64)(tile % tiles_m) * BM, column = (u64)(tile / tiles_m) * BN;
        for (int s = 0; s < p.stages + rank_stages; ++s) {
            const u32 a = shared.stage(ring.slot), b = a + kBytesA, full = shared.full(ring.slot);
            barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
            if (s < p.stages) {
                const u64 m = (u64)s * p.padded_m + row, n = (u64)s * p.padded_n + column;
                const u32 scales = b + kBytesB;
                barrier_expect(full, kBytesA + kBytesB + kBytesRowScales + kBytesColumnScales);
                bulk_load(a, p.qact + m * 128, kBytesA, full);
                bulk_load(b, p.weight + n * 128, kBytesB, full);
                bulk_load(scales, p.act_scale + m * 2, kBytesRowScales, full);
                bulk_load(scales + kBytesRowScales, p.weight_scale + n, kBytesColumnScales, full);
            } else {
                const u64 block = s - p.stages;
                barrier_expect(full, kBytesA + kBytesB);
                bulk_load(a, p.down + (block * p.padded_m + row) * 64, kBytesA, full);
                bulk_load(b, p.proj_up + (block * p.padded_n + column) * 64, kBytesB, full);
            }
            ring.advance();
        }
    }
}

// One warp: the largest chunk_scale of each row of a tile, a tile ahead.
SVDQ_DEVICE void find_tops(const Arguments& p, const Shared& shared, int tiles_m, int tiles) {
    Ring<2> ring;
    const u32 lane = threadIdx.x % 32;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        barrier_wait(shared.top_empty(ring.slot), ring.parity ^ 1);
        const float* scale = p.chunk_scale + (u64)(tile % tiles_m) * BM + lane;
        float top[BM / 32] = {};
#pragma unroll 2
        for (int left = p.stages; left > 0; left -= kChunkStages, scale += p.padded_m)
#pragma unroll
            for (int i = 0; i < BM / 32; ++i)
                top[i] = fmaxf(top[i], scale[32 * i]);
#pragma unroll
        for (int i = 0; i < BM / 32; ++i)
            store_shared4(shared.top(ring.slot) + (lane + 32 * i) * 4, as_bits(top[i]));
        barrier_arrive(shared.top_full(ring.slot));  // each lane for what it wrote
        ring.advance();
    }
}

struct Consumer {
    const Arguments& p;
    const Shared& shared;
    u32 index;  // of the warpgroup
    int lane,
        row;  // this thread's first row in the block's tile; others are 8, 64 and 72 further on
    Ring<kStages> ring;
    Ring<2> tops;

    SVDQ_DEVICE Consumer(const Arguments& p, const Shared& shared)
        : p(p),
          shared(shared),
          index(__shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1),
          lane(threadIdx.x % 32) {
        row = index * 128 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    }

    SVDQ_DEVICE void take_slot() const {
        barrier_wait(shared.full(ring.slot), ring.parity);
    }
    SVDQ_DEVICE void leave_slot() {
        if (lane == 0) barrier_arrive(shared.empty(ring.slot));
        ring.advance();
    }
    SVDQ_DEVICE u32 a(int half) const {
        return shared.stage(ring.slot) + (index * 128 + half * 64) * 128;
    }
    SVDQ_DEVICE u32 b() const {
        return shared.stage(ring.slot) + kBytesA;
    }

    SVDQ_DEVICE void start(u32 (&sum)[kPairs], u32 a, u32 b, int group) const {
        products_fence();
        multiply_fp8(sum, operand(a) + 4 * group, operand(b) + 4 * group, false);
        multiply_fp8(sum, operand(a) + 4 * group + 2, operand(b) + 4 * group + 2, true);
        products_commit();
    }

    // One stage: two groups. Its last half is scaled while the other warpgroup's products run. (The
    // compiler gives up pipelines of products that go on from one round of a loop to the next, and
    // several stages in one round are slower than one.)
    SVDQ_DEVICE void stage(u32 (&acc)[2][kPairs], u32 (&sum)[2][kPairs], const u32 (&factor)[4]) {
        const u32 scales = b() + kBytesB;
        take_slot();
        start(sum[0], a(0), b(), 0);
        start(sum[1], a(1), b(), 0);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            const u32 row_scales = scales + row * 8 + 4 * group;
            const u32 column_scales = scales + kBytesRowScales + lane % 4 * 16 + 64 * group;
            u32 column_scale[BN / 8], row_scale[4];
#pragma unroll
            for (int j = 0; j < BN / 8; j += 4) {
                const uint4 v = load_shared16(column_scales + 32 * j);
                column_scale[j] = v.x, column_scale[j + 1] = v.y;
                column_scale[j + 2] = v.z, column_scale[j + 3] = v.w;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                row_scale[i] =
                    multiply_pairs(load_shared4(row_scales + i / 2 * 512 + i % 2 * 64), factor[i]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (group == 1 && half == 1)
                    products_wait<0>();
                else
                    products_wait<1>();
                products_fence_sums(sum[half]);
#pragma unroll
                for (int i = 0; i < kPairs; ++i)
                    acc[half][i] = multiply_add_pairs(
                        sum[half][i],
                        multiply_pairs(row_scale[2 * half + i % 2], column_scale[i / 2]),
                        acc[half][i]);
                if (group == 0) start(sum[half], a(half), b(), 1);
            }
        }
        leave_slot();
    }

    // acc of a tile, in float32, without what the columns' scales hold.
    SVDQ_DEVICE void multiply(float (&result)[2][2 * kPairs], u64 tile_row) {
        u32 acc[2][kPairs], sum[2][kPairs];
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i)
            acc[i / kPairs][i % kPairs] = sum[i / kPairs][i % kPairs] = 0;

        // Row scales come relative to 512 in their chunk. Relative to the row's largest they are
        // made so small that no sum of all groups overflows fp16, whatever the codes.
        const float* scale = p.chunk_scale + tile_row + row;
        float top[4], inverse[4], next[4];
        barrier_wait(shared.top_full(tops.slot), tops.parity);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            top[i] =
                as_float(load_shared4(shared.top(tops.slot) + (row + i / 2 * 64 + i % 2 * 8) * 4));
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.top_empty(tops.slot));
        tops.advance();
        const float room =
            8.f / as_float((as_bits(2.f * p.stages - 1.f) & 0x7F800000u) + 0x800000u);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            inverse[i] = top[i] > 1e-36f ? reciprocal(top[i]) * room : 0.f;  // less counts as zero
            top[i] *= 1.f / room;
            next[i] = scale[i / 2 * 64 + i % 2 * 8];
        }
        uint4* parked = p.parked + (u64)blockIdx.x * kPairs / 2 * 256 + threadIdx.x - 128;
        const u64 segment_size = (u64)gridDim.x * kPairs / 2 * 256;
        int segments = 0;  // parked
        u32 factor[4];
#pragma unroll 1
        for (int left = p.stages; left > 0; left -= kChunkStages) {
            if (left == p.stages - (segments + 1) * kSegment) {
                uint4* to = parked + segments++ * segment_size;
#pragma unroll
                for (int i = 0; i < 2 * kPairs; i += 4) {
                    u32* from = &acc[i / kPairs][i % kPairs];
                    to[i / 4 * 256] = make_uint4(from[0], from[1], from[2], from[3]);
                    from[0] = from[1] = from[2] = from[3] = 0;
                }
            }
            scale += p.padded_m;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                factor[i] = Fp16::pack(next[i] * inverse[i], next[i] * inverse[i]);
                if (left > kChunkStages) next[i] = scale[i / 2 * 64 + i % 2 * 8];
            }
#pragma unroll 1
            for (int s = 0; s < min(left, kChunkStages); ++s)
                stage(acc, sum, factor);
        }
        // A quarter at a time, the last one first: in float32 a sum takes two registers instead of
        // half of one, so acc has to go while result comes. Segments added to all of result at once
        // left 55 words in local memory. A quarter is five loads under way.
        constexpr int kPart = kPairs / 2;
#pragma unroll
        for (int first = 2 * kPairs - kPart; first >= 0; first -= kPart) {
#pragma unroll
            for (int i = first; i < first + kPart; ++i) {
                result[i / kPairs][i % kPairs * 2] = Fp16::low(acc[i / kPairs][i % kPairs]);
                result[i / kPairs][i % kPairs * 2 + 1] = Fp16::high(acc[i / kPairs][i % kPairs]);
            }
#pragma unroll 1
            for (int s = 0; s < segments; ++s)
#pragma unroll
                for (int i = first; i < first + kPart; i += 4) {
                    const uint4 v = parked[s * segment_size + i / 4 * 256];
                    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        result[i / kPairs][(i % kPairs + j) * 2] += Fp16::low(pairs[j]);
                        result[i / kPairs][(i % kPairs + j) * 2 + 1] += Fp16::high(pairs[j]);
                    }
                }
        }
#pragma unroll
        for (int i = 0; i < 4 * kPairs; ++i)
            result[i / (2 * kPairs)][i % (2 * kPairs)] *= top[i / (2 * kPairs) * 2 + i % 4 / 2];
    }

    // result += down . proj_up^T. In fp16 the operands were scaled to the type's range, by row and
    // block of ranks; `after` is what rows are to be multiplied by afterwards.
    SVDQ_DEVICE void low_rank(float (&result)[2][2 * kPairs], u64 tile_row, float (&after)[4]) {
        for (int block = 0; block * 64 < p.rank; ++block) {
            if (!T::kIsBf16) {
                const float* scale = p.down_scale + (u64)block * p.padded_m + tile_row + row;
                float ratio[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float before = scale[i / 2 * 64 + i % 2 * 8] * p.up_scale[0];
                    ratio[i] = after[i] / before;
                    after[i] = before;
                }
#pragma unroll
                for (int i = 0; i < 4 * kPairs; ++i) {
                    const int half = i / (2 * kPairs), at = i % (2 * kPairs);
                    result[half][at] *= ratio[2 * half + at / 2 % 2];
                }
            }
            const int steps = min(p.rank - block * 64 + 15, 64) / 16;
            take_slot();
#pragma unroll 1
            for (int s = 0; s < steps; ++s) {  // a pipeline of them would be undone by the compiler
                products_fence();
                multiply_16bit<T>(result[0], operand(a(0)) + 2 * s, operand(b()) + 2 * s);
                multiply_16bit<T>(result[1], operand(a(1)) + 2 * s, operand(b()) + 2 * s);
                products_commit();
                products_wait<0>();
            }
            leave_slot();
        }
    }

    // What the epilogue needs of a tile's columns, fetched early: a thread holds one or two of
    // them.
    struct Columns {
        float scale[2], bias[2];

        SVDQ_DEVICE Columns(const Arguments& p, u64 tile_column) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u64 column = tile_column + i * 128 + threadIdx.x % 128;
                scale[i] = p.column_scale[column];
                bias[i] = p.bias && column < p.n ? T::low(p.bias[column]) : 0.f;
            }
        }
    };

    // Scales, adds the bias, and stores: a warp its own 16 rows of each half, through shared
    // memory.
    SVDQ_DEVICE void store(const float (&result)[2][2 * kPairs], u64 tile_row, u64 tile_column,
                           const float (&after)[4], const Columns& columns) const {
        const u32 warp = threadIdx.x % 128 / 32, scales = shared.columns(index);
        warpgroup_sync(index);  // the other warps are done with the tile before
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 column = i * 128 + threadIdx.x % 128;
            if (column < BN)
                store_shared8(scales + column * 8, as_bits(columns.scale[i]),
                              as_bits(columns.bias[i]));
        }
        warpgroup_sync(index);
        const u32 staged = shared.output(index) + warp * 16 * kPitch;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            __syncwarp();
#pragma unroll
            for (int j = 0; j < BN / 8; j += 2) {
                u32 pairs[4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint4 v = load_shared16(scales + (8 * (j + i) + lane % 4 * 2) * 8);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float* from = result[half] + 4 * (j + i) + 2 * h;
                        const float row_scale = T::kIsBf16 ? 1.f : after[2 * half + h];
                        pairs[2 * i + h] = pack_saturated<T>(
                            fmaf(from[0], as_float(v.x) * row_scale, as_float(v.y)),
                            fmaf(from[1], as_float(v.z) * row_scale, as_float(v.w)));
                    }
                }
                store_matrices(staged + lane % 16 * kPitch + lane / 16 * 16 + j * 16, pairs[0],
                               pairs[1], pairs[2], pairs[3]);
            }
            __syncwarp();
            // 16 bytes a lane, whole rows one after another
            constexpr u32 kChunks = BN / 8;
            const u64 first = tile_row + index * 128 + half * 64 + warp * 16;
            u16* out = p.out + first * p.n + tile_column;
            const u32 rows = first < p.m ? (u32)min(p.m - first, (u64)16) : 0;
            const u32 columns_left = (u32)(p.n - tile_column);
#pragma unroll
            for (u32 i = 0; i < 16 * kChunks / 32; ++i) {
                const u32 m = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
                const uint4 v = load_shared16(staged + m * kPitch + chunk * 16);
                if (m < rows && chunk * 8 < columns_left) *(uint4*)(out + m * p.n + chunk * 8) = v;
            }
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    svdq_gemm_hopper(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Shared shared{shared_address(memory)};
    const int tiles_m = (p.m + BM - 1) / BM, tiles = tiles_m * ((p.n + BN - 1) / BN);

    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < kStages; ++slot) {
            barrier_init(shared.full(slot), 1);
            barrier_init(shared.empty(slot), kConsumers * 4);
        }
        for (u32 buffer = 0; buffer < 2; ++buffer) {
            barrier_init(shared.top_full(buffer), 32);
            barrier_init(shared.top_empty(buffer), kConsumers * 4);
        }
        fence_barrier_init();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_decrease<40>();
        if (threadIdx.x == 0) produce(p, shared, tiles_m, tiles);
        if (threadIdx.x / 32 == 1) find_tops(p, shared, tiles_m, tiles);
    } else {
        registers_increase<232>();
        Consumer consumer(p, shared);
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const u64 tile_row = (u64)(tile % tiles_m) * BM,
                      tile_column = (u64)(tile / tiles_m) * BN;
            float result[2][2 * kPairs], after[4] = {1.f, 1.f, 1.f, 1.f};
            const Consumer::Columns columns(p, tile_column);
            consumer.multiply(result, tile_row);
            consumer.low_rank(result, tile_row, after);
            consumer.store(result, tile_row, tile_column, after, columns);
        }
    }
}
