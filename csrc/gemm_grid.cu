// y = sum over groups g of  act_scale[g, m] * (qact . weight over the group) * unit[n]
//     + down . proj_up^T + bias                                                   on sm_90a only
//
// W4A4 for weights whose scales lie on a grid: in every output channel a group's scale is a whole
// number, up to 16, times the channel's unit. Codes times that number fit in int8, so only the
// activation's scales are left to apply after each group of 64, and they belong to whole rows of a
// tile: two numbers for a thread. (gemm_hopper.cu takes any scales, and is slower.)
//
// One instruction for an output and group is all that the scaling costs:
//
// 1. Sums are int32 and are never cleared: run_g is the sum over all groups up to g. Then
//        sum_g s_g (run_g - run_{g-1})  =  sum_g run_g (s_g - s_{g+1}),   s behind the last = 0.
// 2. They start at the bits of the float 1.5 * 2^23, so that while |run| < 2^22 the register, read
//    as float32, is 1.5 * 2^23 + run: no conversion. The constant's own part of the result,
//    1.5 * 2^23 * s_0, is what the result starts from, negative. Where |run| could become too large
//    a new segment begins.
//    The result is rounded at multiples of about half of s_g: 1e-3 of what one group contributes.
//    Scales have twelve bits, which makes the constant's part exact: sums of zero leave nothing.
//
//              channels (2 kHalf)
//            +-----------+-----------+
//   128      | consumer 0, 64 rows   |   two blocks of a cluster stand above each other: each
//   tokens   +-----------+-----------+   copies half of the weight, for both
//            | consumer 1, 64 rows   |
//            +-----------+-----------+
//
// A block runs over the output, tile by tile. The first warpgroup copies (one thread does), the
// other two compute. A consumer has two halves of columns: while one is scaled, the other one's
// products run. A stage is 128 columns of K:
//
//   qact [128][128 bytes, swizzled]  |  weight [2 kHalf][128, swizzled]
//   |  act_scale [consumers][this stage's two groups and the next one][64]
//
// The low-rank branch is one more stage for 64 ranks.
#ifndef SVDQ_COLUMNS  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_COLUMNS 96
#    define SVDQ_STAGES 4
#endif

#include "hopper.cuh"

namespace {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kRows = 64 * kConsumers, kHalf = SVDQ_COLUMNS, kColumns = 2 * kHalf;
constexpr int kStages = SVDQ_STAGES;
constexpr int kSums = kHalf / 2;  // of a thread, in 64 x kHalf / 128
constexpr u32 kBlocks = 2;        // of a cluster

constexpr u32 kBytesAct = kRows * 128, kBytesWeight = kColumns * 128;
constexpr u32 kScales = 3 * 64 * 4;  // bytes of a consumer's
constexpr u32 kBytes = kBytesAct + kBytesWeight, kBytesScales = kConsumers * kScales;
constexpr u32 kStageBytes = (kBytes + kBytesScales + 1023) / 1024 * 1024;
constexpr int kPiece = 48;  // columns of outputs on their way
constexpr u32 kPieceBytes = 64 * kPiece * 2;

constexpr int kOneAndAHalf = 0x4B400000;  // the bits of 1.5 * 2^23
constexpr float kCentre = 12582912.f;
// Taken out of an activation's scale so that 1.5 * 2^23 of them stay in float32's range.
constexpr float kRoom = SVDQ_BF16 ? 0x1p-28f : 1.f;

struct Arguments {
    TensorMap act;            // (M, K) int8
    TensorMap weight;         // (N, K) int8
    TensorMap act_scale;      // (K / 64, M) float32
    TensorMap down;           // (M, rank) 16 bits, the rank a multiple of 64
    TensorMap proj_up;        // (N, rank)
    TensorMap out;            // (M, N) 16 bits
    const float* down_scale;  // (rank / 64, padded M): taken out of `down`; fp16 only
    const float* unit;        // (N,)
    const u16* bias;          // (N,) or null
    int m, n, stages, rank, padded_m;
    int segment;  // stages over which |run| stays below 2^22
    int whole;    // tiles that are not halved
};

struct Shared {
    u32 base;

    SVDQ_DEVICE u32 stage(u32 slot) const {
        return base + slot * kStageBytes;
    }
    SVDQ_DEVICE u32 output(u32 consumer) const {
        return base + kStages * kStageBytes + consumer * (64 * kColumns * 2);
    }
    SVDQ_DEVICE u32 columns(u32 consumer) const {
        return output(kConsumers) + consumer * kColumns * 8;
    }
    SVDQ_DEVICE u32 full(u32 slot) const {
        return columns(kConsumers) + slot * 8;
    }
    SVDQ_DEVICE u32 empty(u32 slot) const {
        return full(kStages) + slot * 8;
    }
};

using Tiles = PairedTiles<kBlocks, kRows, kColumns>;

SVDQ_DEVICE void produce(const Arguments& p, const Shared& shared, const Tiles& tiles) {
    constexpr int kShare = kColumns / kBlocks;
    Ring<kStages> ring;
    const u32 rank = blockIdx.x % kBlocks;
    const int rank_stages = (p.rank + 63) / 64;
    for (int turn = blockIdx.x / kBlocks; turn < tiles.turns.all; turn += gridDim.x / kBlocks) {
        const int row = tiles.row(turn), column = tiles.column(turn) + rank * kShare;
        for (int s = 0; s < p.stages + rank_stages; ++s) {
            const u32 act = shared.stage(ring.slot), weight = act + kBytesAct;
            const u32 mine = weight + rank * kShare * 128, full = shared.full(ring.slot);
            barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
            if (s < p.stages) {
                barrier_expect(full, kBytes + kBytesScales);
                tensor_load_shared_by<kBlocks>(mine, p.weight, s * 128, column, full);
                tensor_load(act, p.act, s * 128, row, full);
#pragma unroll
                for (int c = 0; c < kConsumers; ++c)
                    tensor_load(act + kBytes + c * kScales, p.act_scale, (row + 64 * c) * 4, 2 * s,
                                full);
            } else {
                const int x = (s - p.stages) * 128;
                barrier_expect(full, kBytes);
                tensor_load_shared_by<kBlocks>(mine, p.proj_up, x, column, full);
                tensor_load(act, p.down, x, row, full);
            }
            ring.advance();
        }
    }
}

struct Consumer {
    const Arguments& p;
    const Shared& shared;
    u32 index;      // of the warpgroup
    int lane, row;  // this thread's first row of the warpgroup's; the other is 8 further on
    Ring<kStages> ring;

    SVDQ_DEVICE Consumer(const Arguments& p, const Shared& shared)
        : p(p),
          shared(shared),
          index(__shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1),
          lane(threadIdx.x % 32) {
        row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    }

    SVDQ_DEVICE void take_slot() const {
        barrier_wait(shared.full(ring.slot), ring.parity);
    }
    // Both blocks of the cluster write to the slot next.
    SVDQ_DEVICE void leave_slot() const {
        if (lane < kBlocks) barrier_arrive_at(shared.empty(ring.slot), lane);
    }

    // Lets a turn go by that is the other consumer's alone.
    SVDQ_DEVICE void pass() {
        for (int s = p.stages + (p.rank + 63) / 64; s > 0; --s, ring.advance()) {
            take_slot();
            leave_slot();
        }
    }

    // What the epilogue needs of a tile's columns, to shared memory: unit and bias.
    SVDQ_DEVICE void fetch_columns(int column) const {
        for (u32 c = threadIdx.x % 128; c < kColumns; c += 128) {
            const int n = column + c;
            const float unit = n < p.n ? p.unit[n] : 0.f;
            const float bias = n < p.n && p.bias ? T::low(p.bias[n]) : 0.f;
            store_shared8(shared.columns(index) + c * 8, as_bits(unit), as_bits(bias));
        }
    }

    // One half of the columns: their sums of products, and the result.
    struct Half {
        int run[kSums];
        float result[kSums];

        // Begins a segment, of which these are the scales of the first group.
        SVDQ_DEVICE void begin(const float (&first)[2]) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                run[i] = kOneAndAHalf;
                result[i] = __fmaf_rn(-kCentre, first[i / 2 % 2], result[i]);
            }
            products_fence_sums(run);
        }

        // Starts a group's products; act and weight are its first 32 columns.
        SVDQ_DEVICE void multiply(u64 act, u64 weight) {
            products_fence();
            multiply_int8(run, act, weight, true);
            multiply_int8(run, act + 2, weight + 2, true);
            products_commit();
        }

        // Waits until products that run are the last `Pending`, and adds run, read as float32,
        // times a factor of each row.
        template <int Pending>
        SVDQ_DEVICE void scale(const float (&factor)[2]) {
            products_wait<Pending>();
            products_fence_sums(run);
#pragma unroll
            for (int i = 0; i < kSums; ++i)
                result[i] = __fmaf_rn(as_float((u32)run[i]), factor[i / 2 % 2], result[i]);
        }
    };

    // The scale of one of this thread's rows in a group of the stage, or in the one behind them: to
    // twelve bits, so that 1.5 * 2^23 times it, and with that the constant's whole part, is exact.
    SVDQ_DEVICE float scale(int group, int i) const {
        const u32 table = shared.stage(ring.slot) + kBytes + index * kScales;
        const u32 bits = load_shared4(table + (group * 64 + row + 8 * i) * 4);
        return as_float((bits + 0x800u) & 0xFFFFF000u) * kRoom;
    }

    // Starts a group's products with one half of the columns.
    SVDQ_DEVICE void start(Half (&half)[2], int h, int group) const {
        const u32 stage = shared.stage(ring.slot);
        half[h].multiply(operand(stage + index * 64 * 128) + 4 * group,
                         operand(stage + kBytesAct + h * kHalf * 128) + 4 * group);
    }

    // Between stages no products of this consumer run: the compiler gives up pipelines that go on
    // from one round of a loop to the next. The other consumer's do.
    SVDQ_DEVICE void multiply(Half (&half)[2]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i)
            half[0].result[i] = half[1].result[i] = 0.f;
#pragma unroll 1
        for (int s = p.stages, left = 0; s > 0; --s, --left) {
            take_slot();
            if (left == 0) {
                left = min(s, p.segment);
                const float scales[2] = {scale(0, 0), scale(0, 1)};
                half[0].begin(scales);
                half[1].begin(scales);
            }
            start(half, 0, 0);
            start(half, 1, 0);
            float first[2], second[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                first[i] = scale(0, i) - scale(1, i);
                second[i] = scale(1, i) - (left == 1 ? 0.f : scale(2, i));
            }
            half[0].scale<1>(first);
            start(half, 0, 1);
            half[1].scale<1>(first);
            start(half, 1, 1);
            half[0].scale<1>(second);
            half[1].scale<0>(second);
            leave_slot();
            ring.advance();
        }
    }

    // Unit and bias of two of a half's columns.
    SVDQ_DEVICE uint4 columns(int h, int j) const {
        return load_shared16(shared.columns(index) + (h * kHalf + 8 * j + lane % 4 * 2) * 8);
    }

    SVDQ_DEVICE void apply_units(Half (&half)[2]) const {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < kHalf / 8; ++j) {
                const uint4 c = columns(h, j);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = half[h].result[4 * j + i];
                    sum = sum * as_float(i % 2 ? c.z : c.x) * (1.f / kRoom);
                }
            }
    }

    // `down` of a block of 64 ranks is relative to its rows' scales, and so has the result to be.
    SVDQ_DEVICE void relate(Half (&half)[2], int block, int first_row, float (&after)[2]) const {
        float change[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = first_row + row + 8 * i;
            const float scale = m < p.m ? p.down_scale[(u64)block * p.padded_m + m] : 1.f;
            change[i] = after[i] / scale;
            after[i] = scale;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < kSums; ++i)
                half[h].result[i] *= change[i / 2 % 2];
    }

    // result += down . proj_up^T; `after` is what rows are to be multiplied by afterwards.
    SVDQ_DEVICE void low_rank(Half (&half)[2], int first_row, float (&after)[2]) {
        for (int block = 0; block * 64 < p.rank; ++block) {
            if (!T::kIsBf16) relate(half, block, first_row, after);
            take_slot();
            const u64 down = operand(shared.stage(ring.slot) + index * 64 * 128);
            const u64 up = operand(shared.stage(ring.slot) + kBytesAct);
            products_fence();
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (block * 64 + i * 16 < p.rank)
                        multiply_16bit<T>(half[h].result, down + 2 * i,
                                          up + 2 * i + h * (kHalf * 128 >> 4));
            products_commit();
            products_wait<0>();
            products_fence_sums(half[0].result);
            products_fence_sums(half[1].result);
            leave_slot();
            ring.advance();
        }
    }

    // Adds the bias and stores, in pieces of 64 rows and kPiece columns.
    SVDQ_DEVICE void store(const Half (&half)[2], const float (&after)[2], int first_row,
                           int first_column) const {
        const u32 staged = shared.output(index), warp = threadIdx.x % 128 / 32;
        if (threadIdx.x % 128 == 0) tensor_store_wait<0>();
        warpgroup_sync(index);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < kHalf / 8; j += 2) {
                u32 pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint4 c = columns(h, j + i / 2);
                    const float *sums = half[h].result + 4 * (j + i / 2) + i % 2 * 2,
                                factor = T::kIsBf16 ? 1.f : after[i % 2];
                    pairs[i] = pack_saturated<T>(__fmaf_rn(sums[0], factor, as_float(c.y)),
                                                 __fmaf_rn(sums[1], factor, as_float(c.w)));
                }
                const u32 row = warp * 16 + lane % 16, column = h * kHalf + 8 * (j + lane / 16);
                store_matrices(staged + column / kPiece * kPieceBytes + row * (2 * kPiece) +
                                   2 * (column % kPiece),
                               pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        fence_stores();
        warpgroup_sync(index);
        if (threadIdx.x % 128 == 0) {
#pragma unroll
            for (int piece = 0; piece < kColumns / kPiece; ++piece)
                tensor_store(p.out, 2 * (first_column + piece * kPiece), first_row,
                             staged + piece * kPieceBytes);
        }
    }
};

}  // namespace

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    svdq_gemm_grid(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Shared shared{shared_address(memory)};
    const Tiles tiles(p.m, p.n, p.whole);

    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < kStages; ++slot) {
            barrier_init(shared.full(slot), 1);
            barrier_init(shared.empty(slot), kBlocks * kConsumers * 4);
        }
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync();

    if (threadIdx.x < 128) {
        registers_decrease<24>();
        if (threadIdx.x == 0) produce(p, shared, tiles);
    } else {
        registers_increase<240>();
        Consumer consumer(p, shared);
        for (int turn = blockIdx.x / kBlocks; turn < tiles.turns.all; turn += gridDim.x / kBlocks) {
            if (tiles.turns.half(turn) && consumer.index == 1) {
                consumer.pass();
                continue;
            }
            const int row = tiles.row(turn) + consumer.index * 64, column = tiles.column(turn);
            Consumer::Half half[2];
            float after[2] = {1.f, 1.f};
            consumer.fetch_columns(column);
            consumer.multiply(half);
            warpgroup_sync(consumer.index);
            consumer.apply_units(half);
            consumer.low_rank(half, row, after);
            consumer.store(half, after, row, column);
        }
        if (threadIdx.x % 128 == 0) tensor_store_wait<0>();
    }
    __syncwarp();
    cluster_sync();  // nobody leaves while the other block may still write to its memory
}
