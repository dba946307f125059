// y = (act . weight) * act_scale[m] * weight_scale[n] + down . proj_up^T + bias      on sm_90a only
//
// W8A8: both operands are int8 with one scale for each row, sums are int32 over all of K.
//
//              outputs (kWidth)
//            +-----------------------+
//   128      | consumer 0, 64 rows   |   two blocks of a cluster stand above each other: each
//   tokens   +-----------------------+   copies half of the weight, for both
//            | consumer 1, 64 rows   |
//            +-----------------------+
//
// A product has 256 columns at most; a wider tile is two products of half its columns each.
//
// A block runs over the output, tile by tile. The first warpgroup copies (one thread does), the
// other two compute. A stage is 128 columns of K:
//
//   act [128][128 bytes, swizzled]  |  weight [kWidth][128, swizzled]
//
// The low-rank branch is one more stage for 64 ranks, of `down` and `proj_up`.
#ifndef SVDQ_COLUMNS  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_COLUMNS 144
#    define SVDQ_PRODUCTS 2
#    define SVDQ_STAGES 4
#    define SVDQ_BUFFERS 2
#endif

#include "hopper.cuh"

namespace {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers), kRows = 64 * kConsumers;
constexpr int kProducts = SVDQ_PRODUCTS, kColumns = SVDQ_COLUMNS, kWidth = kProducts * kColumns;
constexpr int kStages = SVDQ_STAGES;
constexpr int kSums = kWidth / 2;  // of a thread, in 64 x kWidth / 128
constexpr u32 kBlocks = 2;         // of a cluster

constexpr u32 kBytesAct = kRows * 128, kBytesWeight = kWidth * 128;
constexpr u32 kStageBytes = kBytesAct + kBytesWeight;
// Outputs on their way: a warp's 16 rows of 64 bytes, swizzled.
constexpr int kPiece = 32, kPieces = kWidth / kPiece, kBuffers = SVDQ_BUFFERS;
constexpr u32 kPieceBytes = 16 * kPiece * 2;

struct Arguments {
    TensorMap act;              // (M, K) int8
    TensorMap weight;           // (N, K) int8
    TensorMap down;             // (M, rank) 16 bits, the rank a multiple of 64
    TensorMap proj_up;          // (N, rank)
    TensorMap out;              // (M, N) 16 bits
    const float* act_scale;     // (M,)
    const float* down_scale;    // (M,) or null: powers of two taken out of `down`
    const float* weight_scale;  // (N,)
    const u16* bias;            // (N,) or null
    int m, n, stages, rank;     // an even number of stages
    int whole;                  // tiles that are not halved
};

struct Shared {
    u32 base;

    SVDQ_DEVICE u32 stage(u32 slot) const {
        return base + slot * kStageBytes;
    }
    SVDQ_DEVICE u32 output(u32 warp) const {
        return base + kStages * kStageBytes + warp * kBuffers * kPieceBytes;
    }
    // Of a tile's columns.
    SVDQ_DEVICE u32 scales() const {
        return output(4 * kConsumers);
    }
    SVDQ_DEVICE u32 biases() const {
        return scales() + kWidth * 4;
    }
    SVDQ_DEVICE u32 full(u32 slot) const {
        return biases() + kWidth * 2 + slot * 8;
    }
    SVDQ_DEVICE u32 empty(u32 slot) const {
        return full(kStages + 1) + slot * 8;
    }
};

constexpr u32 kFactors = kStages;  // the number of the barriers for scales and biases

using Tiles = PairedTiles<kBlocks, kRows, kWidth>;

SVDQ_DEVICE void produce(const Arguments& p, const Shared& shared, const Tiles& tiles) {
    constexpr int kShare = kWidth / kBlocks;
    Ring<kStages> ring;
    u32 parity = 0;  // of the columns' factors
    const u32 rank = blockIdx.x % kBlocks;
    const int rank_stages = (p.rank + 63) / 64;
    for (int turn = blockIdx.x / kBlocks; turn < tiles.turns.all; turn += gridDim.x / kBlocks) {
        const int row = tiles.row(turn), column = tiles.column(turn) + rank * kShare;
        for (int s = 0; s < p.stages + rank_stages; ++s) {
            const u32 act = shared.stage(ring.slot), full = shared.full(ring.slot);
            const u32 mine = act + kBytesAct + rank * kShare * 128;
            barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
            barrier_expect(full, kStageBytes);
            if (s < p.stages) {
                tensor_load_shared_by<kBlocks>(mine, p.weight, s * 128, column, full);
                tensor_load(act, p.act, s * 128, row, full);
            } else {
                const int x = (s - p.stages) * 128;
                tensor_load_shared_by<kBlocks>(mine, p.proj_up, x, column, full);
                tensor_load(act, p.down, x, row, full);
            }
            ring.advance();
        }
        // The columns' factors, last of a tile: those of the one before have been used by now.
        const int first = tiles.column(turn), count = min(kWidth, p.n - first);
        barrier_wait(shared.empty(kFactors), parity ^ 1);
        parity ^= 1;
        barrier_expect(shared.full(kFactors), count * (p.bias ? 6 : 4));
        bulk_load(shared.scales(), p.weight_scale + first, count * 4, shared.full(kFactors));
        if (p.bias) bulk_load(shared.biases(), p.bias + first, count * 2, shared.full(kFactors));
    }
}

// A product's columns of a thread's sums, and its columns' operand.
template <class S>
using ProductSums = S[kColumns / 2];
template <class S>
SVDQ_DEVICE ProductSums<S>& sums_of(S (&sum)[kSums], int product) {
    return *(ProductSums<S>*)(sum + product * (kColumns / 2));
}
SVDQ_DEVICE u64 columns_of(u64 columns, int product) {
    return columns + (product * kColumns * 128 >> 4);
}

struct Consumer {
    const Arguments& p;
    const Shared& shared;
    u32 index;      // of the warpgroup
    int lane, row;  // this thread's first row in the block's tile; the other is 8 further on
    Ring<kStages> ring;
    u32 parity = 0;  // of the columns' factors

    SVDQ_DEVICE Consumer(const Arguments& p, const Shared& shared)
        : p(p),
          shared(shared),
          index(__shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1),
          lane(threadIdx.x % 32) {
        row = index * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    }

    SVDQ_DEVICE void take_slot() const {
        barrier_wait(shared.full(ring.slot), ring.parity);
    }
    // Both blocks of the cluster write to the slot next.
    SVDQ_DEVICE void leave_slot(u32 slot) const {
        if (lane < kBlocks) barrier_arrive_at(shared.empty(slot), lane);
    }

    // Lets a turn go by that is the other consumer's alone.
    SVDQ_DEVICE void pass() {
        for (int s = p.stages + (p.rank + 63) / 64; s > 0; --s, ring.advance()) {
            take_slot();
            leave_slot(ring.slot);
        }
        take_factors();
        leave_factors();
    }

    SVDQ_DEVICE void take_factors() {
        barrier_wait(shared.full(kFactors), parity);
        parity ^= 1;
    }
    SVDQ_DEVICE void leave_factors() const {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.empty(kFactors));
    }

    // One stage; when it returns its products may still run, those of the stage before do not.
    template <bool First>
    SVDQ_DEVICE void stage(int (&sum)[kSums], bool keep, u32 before) {
        take_slot();
        const u64 weight = operand(shared.stage(ring.slot) + kBytesAct);
        const u64 act = operand(shared.stage(ring.slot) + index * 64 * 128);
        products_fence();
#pragma unroll
        for (int i = 0; i < 4 * kProducts; ++i) {
            const int step = i / kProducts, product = i % kProducts;
            multiply_int8(sums_of(sum, product), act + 2 * step,
                          columns_of(weight, product) + 2 * step, keep || step > 0);
        }
        products_commit();
        if (!First) {
            products_wait<1>();
            leave_slot(before);
        }
        ring.advance();
    }

    SVDQ_DEVICE void multiply(int (&sum)[kSums]) {
        u32 before = ring.slot;
        stage<true>(sum, false, 0);
#pragma unroll 1
        for (int s = 2; s < p.stages; s += 2) {
            u32 now = ring.slot;
            stage<false>(sum, true, before);
            before = ring.slot;
            stage<false>(sum, true, now);
        }
        const u32 last = ring.slot;
        stage<false>(sum, true, before);
        products_wait<0>();
        products_fence_sums(sum);
        leave_slot(last);
    }

    // What a tile's end needs of this thread's rows, fetched early.
    struct Factors {
        float before[2], after[2];

        SVDQ_DEVICE Factors(const Arguments& p, int first_row) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int m = first_row + 8 * i;
                before[i] = m < p.m ? p.act_scale[m] : 0.f;
                after[i] = 1.f;
                if (m < p.m && p.down_scale) {
                    after[i] = p.down_scale[m];
                    before[i] /= after[i];
                }
            }
        }
    };

    // Scales and biases of this thread's two columns c and c + 1.
    SVDQ_DEVICE float4 columns(int c) const {
        const uint2 scales = load_shared8(shared.scales() + c * 4);
        const u32 biases = p.bias ? load_shared4(shared.biases() + c * 2) : 0u;
        return make_float4(as_float(scales.x), as_float(scales.y), T::low(biases), T::high(biases));
    }

    // result += down . proj_up^T
    SVDQ_DEVICE void low_rank(float (&result)[kSums]) {
        for (int block = 0; block * 64 < p.rank; ++block) {
            take_slot();
            const u64 down = operand(shared.stage(ring.slot) + index * 64 * 128);
            const u64 up = operand(shared.stage(ring.slot) + kBytesAct);
            products_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (block * 64 + i * 16 < p.rank)
#pragma unroll
                    for (int product = 0; product < kProducts; ++product)
                        multiply_16bit<T>(sums_of(result, product), down + 2 * i,
                                          columns_of(up, product) + 2 * i);
            products_commit();
            products_wait<0>();
            products_fence_sums(result);
            leave_slot(ring.slot);
            ring.advance();
        }
    }

    // Stores value(i, columns' factors) of sums i to i + 3, in pieces of a warp's 16 rows and 32
    // columns: no warp waits for another.
    template <class Value>
    SVDQ_DEVICE void store(const Value& value, int first_row, int first_column) const {
        const u32 warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0) - 4, r = lane % 16;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const u32 buffer = shared.output(warp) + piece % kBuffers * kPieceBytes;
            u32 pairs[kPiece / 8][2];
#pragma unroll
            for (int j = 0; j < kPiece / 8; ++j) {
                const int eight = piece * kPiece + 8 * j;
                const float4 y = value(eight / 2, columns(eight + lane % 4 * 2));
                pairs[j][0] = pack_saturated<T>(y.x, y.y);
                pairs[j][1] = pack_saturated<T>(y.z, y.w);
                asm volatile("" : "+r"(pairs[j][0]), "+r"(pairs[j][1]));  // before it waits
            }
            tensor_store_wait<kBuffers - 1>();  // the first lane has some to wait for
            __syncwarp();
#pragma unroll
            for (int j = 0; j < kPiece / 8; j += 2)
                store_matrices(buffer + r * 64 + ((j + lane / 16) ^ r / 2 % 4) * 16, pairs[j][0],
                               pairs[j][1], pairs[j + 1][0], pairs[j + 1][1]);
            fence_stores();
            __syncwarp();
            if (lane == 0)
                tensor_store(p.out, 2 * (first_column + piece * kPiece), first_row + warp * 16,
                             buffer);
        }
    }

    SVDQ_DEVICE void finish(const int (&sum)[kSums], const Factors& f, int first_row,
                            int first_column) {
        take_factors();
        if (p.rank == 0) {
            store(
                [&](int i, float4 c) {
                    return make_float4(__fmaf_rn((float)sum[i] * f.before[0], c.x, c.z),
                                       __fmaf_rn((float)sum[i + 1] * f.before[0], c.y, c.w),
                                       __fmaf_rn((float)sum[i + 2] * f.before[1], c.x, c.z),
                                       __fmaf_rn((float)sum[i + 3] * f.before[1], c.y, c.w));
                },
                first_row, first_column);
            leave_factors();
            return;
        }
        float result[kSums];
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float4 c = columns(2 * i + lane % 4 * 2);
            result[i] = (float)sum[i] * f.before[0] * c.x;
            result[i + 1] = (float)sum[i + 1] * f.before[0] * c.y;
            result[i + 2] = (float)sum[i + 2] * f.before[1] * c.x;
            result[i + 3] = (float)sum[i + 3] * f.before[1] * c.y;
        }
        low_rank(result);
        store(
            [&](int i, float4 c) {
                return make_float4(__fmaf_rn(result[i], f.after[0], c.z),
                                   __fmaf_rn(result[i + 1], f.after[0], c.w),
                                   __fmaf_rn(result[i + 2], f.after[1], c.z),
                                   __fmaf_rn(result[i + 3], f.after[1], c.w));
            },
            first_row, first_column);
        leave_factors();
    }
};

}  // namespace

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    svdq_gemm_rows(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Shared shared{shared_address(memory)};
    const Tiles tiles(p.m, p.n, p.whole);

    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < kStages; ++slot) {
            barrier_init(shared.full(slot), 1);
            barrier_init(shared.empty(slot), kBlocks * kConsumers * 4);
        }
        barrier_init(shared.full(kFactors), 1);
        barrier_init(shared.empty(kFactors), kConsumers * 4);
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync();
    wait_for_kernel_before();

    if (threadIdx.x < 128) {
        registers_decrease<40>();
        if (threadIdx.x == 0) produce(p, shared, tiles);
    } else {
        registers_increase<232>();
        Consumer consumer(p, shared);
        for (int turn = blockIdx.x / kBlocks; turn < tiles.turns.all; turn += gridDim.x / kBlocks) {
            if (tiles.turns.half(turn) && consumer.index == 1) {
                consumer.pass();
                continue;
            }
            const int row = tiles.row(turn), column = tiles.column(turn);
            const Consumer::Factors factors(p, row + consumer.row);
            int sum[kSums];
            consumer.multiply(sum);
            consumer.finish(sum, factors, row, column);
        }
        if (consumer.lane == 0) tensor_store_wait<0>();
    }
    __syncwarp();
    cluster_sync();  // nobody leaves while the other block may still write to its memory
}
