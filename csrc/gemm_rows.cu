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
// A block runs over the output, tile by tile. The first warpgroup copies (one thread does), the
// other two compute. A stage is 128 columns of K:
//
//   act [128][128 bytes, swizzled]  |  weight [kWidth][128, swizzled]
//
// The low-rank branch, in builds that have one, is one more stage for 64 ranks, of `down` and
// `proj_up`.
//
// In wide builds without it a tile's columns have a left and a right part. At its first two stages
// and at its last two these are multiplied one after the other, so that one part is scaled and
// stored while the tensor cores are at the other, or at the next tile's:
//
//   stages      ...     n - 2, n - 1      |    0, 1   (of the next tile)   2 ...
//   products    both    left     right    |    left     right              both
//   stored                       left          right
#ifndef SVDQ_COLUMNS  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_COLUMNS 288
#    define SVDQ_LOW_RANK 0
#    define SVDQ_STAGES 4
#    define SVDQ_BUFFERS 2
#endif

#include "hopper.cuh"

namespace {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers), kRows = 64 * kConsumers;
constexpr bool kLowRank = SVDQ_LOW_RANK;
constexpr int kWidth = SVDQ_COLUMNS, kLeft = (kWidth + 63) / 64 * 32, kRight = kWidth - kLeft;
// In a narrow tile it gains less than reading the left operand twice costs.
constexpr bool kParted = !kLowRank && kWidth > 192;
constexpr int kStages = SVDQ_STAGES;
constexpr int kSums = kWidth / 2;  // of a thread, in 64 x kWidth / 128
static_assert(kStages >= 4, "the last two stages of a tile are held while the next two come");
constexpr u32 kBlocks = 2;  // of a cluster

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
    int m, n, stages, rank;     // an even number of stages, four at least
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
            if (s != p.stages - 1) continue;
            // The columns' factors: those of the tile before have been used by now. Further stages
            // may need slots that are left only after these are there.
            const int first = tiles.column(turn), count = min(kWidth, p.n - first);
            barrier_wait(shared.empty(kFactors), parity ^ 1);
            parity ^= 1;
            barrier_expect(shared.full(kFactors), count * (p.bias ? 6 : 4));
            bulk_load(shared.scales(), p.weight_scale + first, count * 4, shared.full(kFactors));
            if (p.bias)
                bulk_load(shared.biases(), p.bias + first, count * 2, shared.full(kFactors));
        }
    }
}

// A thread's sums of the left columns and of the right ones.
template <class S>
using LeftSums = S[kLeft / 2];
template <class S>
using RightSums = S[kRight / 2];
template <class S>
SVDQ_DEVICE LeftSums<S>& left_of(S (&sum)[kSums]) {
    return *(LeftSums<S>*)sum;
}
template <class S>
SVDQ_DEVICE RightSums<S>& right_of(S (&sum)[kSums]) {
    return *(RightSums<S>*)(sum + kLeft / 2);
}
// The right columns' operand, given the left ones'.
SVDQ_DEVICE u64 right_of(u64 columns) {
    return columns + (kLeft * 128 >> 4);
}
enum Part { kLeftPart, kRightPart, kBoth };

// A product of all of a tile's columns. More than 256 are two; and so are parts, since a part's
// sums and a whole tile's cannot be the same registers.
constexpr bool kTwoProducts = kParted || kWidth > 256;
template <int Sums>
SVDQ_DEVICE void multiply_both(int (&sum)[Sums], u64 act, u64 weight, bool keep) {
    if constexpr (kTwoProducts) {
        multiply_int8(left_of(sum), act, weight, keep);
        multiply_int8(right_of(sum), act, right_of(weight), keep);
    } else {
        multiply_int8(sum, act, weight, keep);
    }
}
template <int Sums>
SVDQ_DEVICE void multiply_both(float (&sum)[Sums], u64 down, u64 up) {
    if constexpr (kTwoProducts) {
        multiply_16bit<T>(left_of(sum), down, up);
        multiply_16bit<T>(right_of(sum), down, right_of(up));
    } else {
        multiply_16bit<T>(sum, down, up);
    }
}

struct Consumer {
    const Arguments& p;
    const Shared& shared;
    const Tiles& tiles;
    int turn;
    u32 index;      // of the warpgroup
    int lane, row;  // this thread's first row in the block's tile; the other is 8 further on
    Ring<kStages> ring;
    u32 parity = 0;  // of the columns' factors

    SVDQ_DEVICE Consumer(const Arguments& p, const Shared& shared, const Tiles& tiles)
        : p(p),
          shared(shared),
          tiles(tiles),
          turn(blockIdx.x / kBlocks),
          index(__shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1),
          lane(threadIdx.x % 32) {
        row = index * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    }

    // The next stage's slot, when it is full.
    SVDQ_DEVICE u32 take_slot() {
        const u32 slot = ring.slot;
        barrier_wait(shared.full(slot), ring.parity);
        ring.advance();
        return slot;
    }
    // Both blocks of the cluster write to the slot next.
    SVDQ_DEVICE void leave_slot(u32 slot) const {
        if (lane < kBlocks) barrier_arrive_at(shared.empty(slot), lane);
    }

    // Lets a turn go by that is the other consumer's alone.
    SVDQ_DEVICE void pass() {
        for (int s = p.stages + (p.rank + 63) / 64; s > 0; --s)
            leave_slot(take_slot());
        take_factors();
        leave_factors();
    }

    SVDQ_DEVICE void take_factors() {
        barrier_wait(shared.full(kFactors), parity);
        parity ^= 1;
    }
    SVDQ_DEVICE void leave_factors() const {
        barrier_arrive(shared.empty(kFactors));
    }

    // Starts the products of a stage.
    template <Part Which>
    SVDQ_DEVICE void start(int (&sum)[kSums], u32 slot, bool keep) const {
        const u64 weight = operand(shared.stage(slot) + kBytesAct);
        const u64 act = operand(shared.stage(slot) + index * 64 * 128);
        products_fence();
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const bool add = keep || i > 0;
            if (Which == kBoth) multiply_both(sum, act + i, weight + i, add);
            if (Which == kLeftPart) multiply_int8(left_of(sum), act + i, weight + i, add);
            if (Which == kRightPart)
                multiply_int8(right_of(sum), act + i, right_of(weight) + i, add);
        }
        products_commit();
    }

    // The next stage. Returns its slot when the products before these, of slot `before`, have
    // ended.
    template <Part Which>
    SVDQ_DEVICE u32 multiply_stage(int (&sum)[kSums], u32 before) {
        const u32 slot = take_slot();
        start<Which>(sum, slot, true);
        products_wait<1>();
        leave_slot(before);
        return slot;
    }

    static constexpr Part kFirst = kParted ? kLeftPart : kBoth;

    // A tile's first two stages, which `held` then has; of parts only the left one.
    SVDQ_DEVICE void begin(int (&sum)[kSums], u32 (&held)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            held[i] = take_slot();
            start<kFirst>(sum, held[i], i > 0);
        }
    }

    // All that follows. Products of the last two stages, which `held` then has, still run; of parts
    // the right one's come last.
    SVDQ_DEVICE void multiply(int (&sum)[kSums], u32 (&held)[2]) {
        if (kParted) {
            products_wait<0>();  // the compiler wants an end between a part's sums and new ones
            start<kRightPart>(sum, held[0], false);
            start<kRightPart>(sum, held[1], true);
        }
        products_wait<1>();
        leave_slot(held[0]);
        u32 slot = held[1];
#pragma unroll 1
        for (int s = 4; s < p.stages; s += 2) {
            slot = multiply_stage<kBoth>(sum, slot);
            slot = multiply_stage<kBoth>(sum, slot);
        }
        held[0] = multiply_stage<kFirst>(sum, slot);
        held[1] = take_slot();
        start<kFirst>(sum, held[1], true);
        if (kParted) {
            start<kRightPart>(sum, held[0], true);
            start<kRightPart>(sum, held[1], true);
        }
    }

    // A part's sums when its products have ended: to float32 in their place, all at once, because
    // the compiler lets nothing read them as they are once other products have begun.
    template <int Count>
    SVDQ_DEVICE static void to_float(int (&sum)[Count]) {
        products_fence_sums(sum);
#pragma unroll
        for (int i = 0; i < Count; ++i)
            sum[i] = as_bits((float)sum[i]);
    }
    SVDQ_DEVICE static float number(int sum) {
        return kParted ? as_float(sum) : (float)sum;
    }

    // What a tile's end needs to know: where it is, and of this thread's rows, fetched early.
    struct End {
        int row, column;
        float before[2], after[2];

        SVDQ_DEVICE End() {}
        SVDQ_DEVICE End(const Arguments& p, int row, int column, int first_row)
            : row(row), column(column) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int m = row + first_row + 8 * i;
                before[i] = m < p.m ? p.act_scale[m] : 0.f;
                after[i] = 1.f;
                if (kLowRank && m < p.m && p.down_scale) {
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
            const u32 slot = take_slot();
            const u64 down = operand(shared.stage(slot) + index * 64 * 128);
            const u64 up = operand(shared.stage(slot) + kBytesAct);
            products_fence();
#pragma unroll
            for (int i = 0; i < 8; i += 2)
                if (block * 64 + i * 8 < p.rank) multiply_both(result, down + i, up + i);
            products_commit();
            products_wait<0>();
            products_fence_sums(result);
            leave_slot(slot);
        }
    }

    // Stores value(i, columns' factors) of sums i to i + 3, in pieces of a warp's 16 rows and 32
    // columns, some of a tile's: no warp waits for another.
    template <int First, int Last, class Value>
    SVDQ_DEVICE void store(const Value& value, const End& end) const {
        const u32 warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0) - 4, r = lane % 16;
#pragma unroll
        for (int piece = First; piece < Last; ++piece) {
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
                tensor_store(p.out, 2 * (end.column + piece * kPiece), end.row + warp * 16, buffer);
        }
    }

    // Sums in float32 of some pieces, of a tile without a low-rank branch.
    template <int First, int Last>
    SVDQ_DEVICE void scale_and_store(const int (&sum)[kSums], const End& end) const {
        store<First, Last>(
            [&](int i, float4 c) {
                return make_float4(__fmaf_rn(number(sum[i]) * end.before[0], c.x, c.z),
                                   __fmaf_rn(number(sum[i + 1]) * end.before[0], c.y, c.w),
                                   __fmaf_rn(number(sum[i + 2]) * end.before[1], c.x, c.z),
                                   __fmaf_rn(number(sum[i + 3]) * end.before[1], c.y, c.w));
            },
            end);
    }

    SVDQ_DEVICE void add_low_rank_and_store(const int (&sum)[kSums], const End& end) {
        float result[kSums];
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float4 c = columns(2 * i + lane % 4 * 2);
            result[i] = number(sum[i]) * end.before[0] * c.x;
            result[i + 1] = number(sum[i + 1]) * end.before[0] * c.y;
            result[i + 2] = number(sum[i + 2]) * end.before[1] * c.x;
            result[i + 3] = number(sum[i + 3]) * end.before[1] * c.y;
        }
        low_rank(result);
        store<0, kPieces>(
            [&](int i, float4 c) {
                return make_float4(__fmaf_rn(result[i], end.after[0], c.z),
                                   __fmaf_rn(result[i + 1], end.after[0], c.w),
                                   __fmaf_rn(result[i + 2], end.after[1], c.z),
                                   __fmaf_rn(result[i + 3], end.after[1], c.w));
            },
            end);
    }

    // Halves of tiles, which are the first consumer's alone, come last.
    SVDQ_DEVICE bool takes_part() const {
        return turn < tiles.turns.all && !(tiles.turns.half(turn) && index == 1);
    }
    SVDQ_DEVICE void next_turn() {
        turn += gridDim.x / kBlocks;
    }

    SVDQ_DEVICE void run() {
        if (kParted)
            run_in_parts();
        else
            run_whole();
        for (; turn < tiles.turns.all; next_turn())
            pass();
        if (lane == 0) tensor_store_wait<0>();
    }

    SVDQ_DEVICE void run_whole() {
        for (; takes_part(); next_turn()) {
            const End end(p, tiles.row(turn), tiles.column(turn), row);
            int sum[kSums];
            u32 held[2];
            begin(sum, held);
            multiply(sum, held);
            take_factors();
            products_wait<0>();
            products_fence_sums(sum);
            leave_slot(held[0]);
            leave_slot(held[1]);
            if (kLowRank)
                add_low_rank_and_store(sum, end);
            else
                scale_and_store<0, kPieces>(sum, end);
            leave_factors();
        }
    }

    SVDQ_DEVICE void run_in_parts() {
        if (!takes_part()) return;
        constexpr int kLeftPieces = kLeft / kPiece;
        int sum[kSums];
        u32 held[2];
        End end;
        begin(sum, held);
#pragma unroll 1
        while (true) {
            end = End(p, tiles.row(turn), tiles.column(turn), row);
            multiply(sum, held);
            take_factors();
            products_wait<2>();
            to_float(left_of(sum));
            scale_and_store<0, kLeftPieces>(sum, end);
            products_wait<0>();
            products_fence_sums(right_of(sum));
            leave_slot(held[0]);
            leave_slot(held[1]);
            next_turn();
            if (!takes_part()) break;
            begin(sum, held);
            to_float(right_of(sum));
            scale_and_store<kLeftPieces, kPieces>(sum, end);
            leave_factors();
        }
        to_float(right_of(sum));
        scale_and_store<kLeftPieces, kPieces>(sum, end);
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
        barrier_init(shared.empty(kFactors), kConsumers * 128);
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync();
    wait_for_kernel_before();
    let_next_kernel_start();

    if (threadIdx.x < 128) {
        registers_decrease<40>();
        if (threadIdx.x == 0) produce(p, shared, tiles);
    } else {
        registers_increase<232>();
        Consumer(p, shared, tiles).run();
    }
    __syncwarp();
    cluster_sync();  // nobody leaves while the other block may still write to its memory
}
