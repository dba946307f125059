// y = (sum over K of act . weight) * tensor_scale * channel_scale[n] + down . proj_up^T + bias
//                                                                            on sm_90a only
//
// NVFP4, exact: E2M1 codes times E4M3 scales fit in fp16. The activation comes that way from its
// quantizer, the weight stays at 4 bits and is expanded in registers; sums are float32.
//
// The output is computed transposed, weights' rows against tokens' columns, because a warpgroup's
// product takes its first operand from registers and its second from shared memory only.
//
//              tokens (kTokens)
//            +----------------------+
//   128 rows | consumer 0, 64 rows  |   two blocks of a cluster stand above each other: each
//   of the   +----------------------+   copies half of the tokens' operand, for both
//   weight   | consumer 1, 64 rows  |
//            +----------------------+
//
// A block runs over the output, tile by tile. The first warpgroup copies (one thread does), the
// other two compute. A stage is 128 bytes of every token's row:
//
//   tokens [kTokens][128 bytes, swizzled]  |  weight [128][32 bytes]  |  scales [4][128]
//
// The low-rank branch is one more stage for 64 ranks; proj_up goes to registers directly.
#ifndef SVDQ_COLUMNS  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_COLUMNS 256
#    define SVDQ_STAGES 4
#endif

#include "hopper.cuh"

namespace {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kRows = 64 * kConsumers, kTokens = SVDQ_COLUMNS, kStages = SVDQ_STAGES;
constexpr int kSums = kTokens / 2;  // of a thread, in 64 x kTokens / 128
constexpr u32 kBlocks = 2;          // of a cluster

constexpr u32 kBytesTokens = kTokens * 128;
constexpr u32 kBytesWeight = kRows * 32, kBytesScales = 4 * kRows;
constexpr u32 kStageBytes = (kBytesTokens + kBytesWeight + kBytesScales + 1023) / 1024 * 1024;
// Outputs on their way.
constexpr int kPiece = 32, kPieces = kTokens / kPiece, kBuffers = 4;
constexpr u32 kPieceBytes = kPiece * 128;

struct Arguments {
    TensorMap act;              // (M, K) fp16
    TensorMap weight;           // (N, K / 2) of two codes
    TensorMap scales;           // (K / 16, N) E4M3
    TensorMap down;             // (M, rank) 16 bits, the rank a multiple of 64
    TensorMap out;              // (M, N) 16 bits
    const float* down_scale;    // (M,) or null: powers of two taken out of `down`; fp16 only
    const float* tensor_scale;  // (1,)
    const u16* channel_scale;   // (N,) or null
    const u16* proj_up;         // (N, rank)
    const u16* bias;            // (N,) or null
    int m, n, stages, rank;     // an even number of stages
    int whole;                  // tiles that are not halved
};

struct Shared {
    u32 base;

    SVDQ_DEVICE u32 stage(u32 slot) const {
        return base + slot * kStageBytes;
    }
    SVDQ_DEVICE u32 output(u32 consumer) const {
        return base + kStages * kStageBytes + consumer * kBuffers * kPieceBytes;
    }
    SVDQ_DEVICE u32 full(u32 slot) const {
        return output(kConsumers) + slot * 8;
    }
    SVDQ_DEVICE u32 empty(u32 slot) const {
        return full(kStages) + slot * 8;
    }
};

// The tiles of a cluster: a tile of tokens, and two of the weight's rows.
struct Tiles {
    int tokens;
    Turns turns;

    SVDQ_DEVICE explicit Tiles(const Arguments& p)
        : tokens((p.m + kTokens - 1) / kTokens),
          turns(tokens * ((p.n + kBlocks * kRows - 1) / (kBlocks * kRows)), p.whole) {}
    SVDQ_DEVICE int token(int turn) const {
        return turns.tile(turn) % tokens * kTokens;
    }
    SVDQ_DEVICE int row(int turn) const {
        const int pair = turns.tile(turn) / tokens;
        return (pair * kBlocks + blockIdx.x % kBlocks) * kRows + turns.skipped(turn);
    }
};

SVDQ_DEVICE void produce(const Arguments& p, const Shared& shared, const Tiles& tiles) {
    constexpr int kShare = kTokens / kBlocks;
    Ring<kStages> ring;
    const u32 rank = blockIdx.x % kBlocks;
    const int rank_stages = (p.rank + 63) / 64;
    for (int turn = blockIdx.x / kBlocks; turn < tiles.turns.all; turn += gridDim.x / kBlocks) {
        const int row = tiles.row(turn), token = tiles.token(turn) + rank * kShare;
        for (int s = 0; s < p.stages + rank_stages; ++s) {
            const u32 tokens = shared.stage(ring.slot), mine = tokens + rank * kShare * 128;
            const u32 weight = tokens + kBytesTokens, full = shared.full(ring.slot);
            barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
            if (s < p.stages) {
                barrier_expect(full, kBytesTokens + kBytesWeight + kBytesScales);
                tensor_load_shared_by<kBlocks>(mine, p.act, s * 128, token, full);
                tensor_load(weight, p.weight, s * 32, row, full);
                tensor_load(weight + kBytesWeight, p.scales, row, s * 4, full);
            } else {
                barrier_expect(full, kBytesTokens);
                tensor_load_shared_by<kBlocks>(mine, p.down, (s - p.stages) * 128, token, full);
            }
            ring.advance();
        }
    }
}

// Eight E2M1 codes of a row, times their scale times 2^-14, in fp16: in that type a code's three
// bits are its value times 2^-14 when they are put at the end of the exponent.
SVDQ_DEVICE void expand(u32 codes, u32 scale, u32& a0, u32& a1, u32& a2, u32& a3) {
    const u32 odd = codes >> 4;
    u32 pairs[4] = {__byte_perm(codes, odd, 0x0400), __byte_perm(codes, odd, 0x0501),
                    __byte_perm(codes, odd, 0x0602), __byte_perm(codes, odd, 0x0703)};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pairs[i] = multiply_pairs(
            ((pairs[i] << 9) & 0x0E000E00u) | ((pairs[i] << 12) & 0x80008000u), scale);
    a0 = pairs[0], a1 = pairs[1], a2 = pairs[2], a3 = pairs[3];
}

struct Consumer {
    const Arguments& p;
    const Shared& shared;
    u32 index;      // of the warpgroup
    int lane, row;  // this thread's first row in the block's tile; the other is 8 further on
    Ring<kStages> ring;

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
    }

    // This thread's share of a stage's weight: rows and their scales to four products' operands.
    SVDQ_DEVICE void fragments(u32 (&a)[16]) const {
        const u32 weight = shared.stage(ring.slot) + kBytesTokens;
        const u32 scale = weight + kBytesWeight + lane % 4 * kRows + row;
        const uint2 low = load_shared8(weight + row * 32 + lane % 4 * 8);
        const uint2 high = load_shared8(weight + (row + 8) * 32 + lane % 4 * 8);
        const u32 scales = e4m3_pair_to_fp16(load_shared1(scale), load_shared1(scale + 8));
        const u32 low_scale = __byte_perm(scales, 0, 0x1010);
        const u32 high_scale = __byte_perm(scales, 0, 0x3232);
        expand(low.x, low_scale, a[0], a[2], a[4], a[6]);
        expand(low.y, low_scale, a[8], a[10], a[12], a[14]);
        expand(high.x, high_scale, a[1], a[3], a[5], a[7]);
        expand(high.y, high_scale, a[9], a[11], a[13], a[15]);
    }

    // One stage; when it returns its products may still run, those of the stage before do not.
    template <bool First>
    SVDQ_DEVICE void stage(float (&sum)[kSums], u32 (&a)[16], bool keep, u32 before) {
        take_slot();
        const u64 tokens = operand(shared.stage(ring.slot));
        fragments(a);
        products_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
            multiply_16bit<Fp16>(sum, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3],
                                 tokens + 2 * i, keep || i > 0);
        products_commit();
        if (!First) {
            products_wait<1>();
            leave_slot(before);
        }
        ring.advance();
    }

    SVDQ_DEVICE void multiply(float (&sum)[kSums]) {
        u32 a[2][16], before = ring.slot;
        stage<true>(sum, a[0], false, 0);
#pragma unroll 1
        for (int s = 2; s < p.stages; s += 2) {
            u32 now = ring.slot;
            stage<false>(sum, a[1], true, before);
            before = ring.slot;
            stage<false>(sum, a[0], true, now);
        }
        const u32 last = ring.slot;
        stage<false>(sum, a[1], true, before);
        products_wait<0>();
        products_fence_sums(sum);
        leave_slot(last);
    }

    // What the epilogue needs of a tile, fetched early: of this thread's rows, and of some tokens.
    struct Factors {
        static constexpr int kShare = (kTokens + 127) / 128;
        float weight[2], bias[2], after[kShare];

        SVDQ_DEVICE Factors(const Arguments& p, int first_row, int first_token) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = first_row + 8 * i;
                const bool valid = n < p.n;
                weight[i] = p.tensor_scale[0] * 16384.f;  // expand() left a factor of 2^-14
                if (valid && p.channel_scale) weight[i] *= T::low(p.channel_scale[n]);
                bias[i] = valid && p.bias ? T::low(p.bias[n]) : 0.f;
            }
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                const int token = first_token + i * 128 + threadIdx.x % 128;
                after[i] = token < p.m && p.down_scale ? p.down_scale[token] : 1.f;
            }
        }
    };

    // One over `down`'s factor and the factor, of two of this thread's tokens; they pass through
    // where outputs will be staged.
    SVDQ_DEVICE uint4 token_factors(int j) const {
        return load_shared16(shared.output(index) + (8 * j + lane % 4 * 2) * 8);
    }

    // sum, scaled; in fp16 relative to what `down` is.
    SVDQ_DEVICE void scale(float (&sum)[kSums], const Factors& f) const {
        if (threadIdx.x % 128 == 0) tensor_store_wait<0>();
        warpgroup_sync(index);
#pragma unroll
        for (int i = 0; i < kSums; ++i)
            sum[i] *= f.weight[i / 2 % 2];
        if (T::kIsBf16) return;
#pragma unroll
        for (int i = 0; i < Factors::kShare; ++i) {
            const u32 token = i * 128 + threadIdx.x % 128;
            if (token < kTokens)
                store_shared8(shared.output(index) + token * 8, as_bits(1.f / f.after[i]),
                              as_bits(f.after[i]));
        }
        warpgroup_sync(index);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            const uint4 tokens = token_factors(j);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sum[4 * j + i] *= as_float(i % 2 ? tokens.z : tokens.x);
        }
    }

    // This thread's share of 64 ranks of proj_up. The last ranks may be less than sixteen.
    SVDQ_DEVICE void fetch_up(u32 (&a)[16], int block, int first_row) const {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int n = first_row + i % 2 * 8;
            const int r = block * 64 + i / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2;
            a[i] = n < p.n && r < p.rank ? *(const u32*)(p.proj_up + (u64)n * p.rank + r) : 0u;
        }
    }

    // result += proj_up . down^T; `a` is proj_up's first 64 ranks.
    SVDQ_DEVICE void low_rank(float (&result)[kSums], u32 (&a)[16], int first_row) {
        for (int block = 0; block * 64 < p.rank; ++block) {
            if (block > 0) fetch_up(a, block, first_row);
            take_slot();
            const u64 tokens = operand(shared.stage(ring.slot));
            products_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (block * 64 + i * 16 < p.rank)
                    multiply_16bit<T>(result, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3],
                                      tokens + 2 * i, true);
            products_commit();
            products_wait<0>();
            products_fence_sums(result);
            leave_slot(ring.slot);
            ring.advance();
        }
    }

    // Adds the bias and stores, in pieces of 32 tokens and this warpgroup's 64 rows, transposed on
    // their way through shared memory: 128 bytes of a token's row, swizzled.
    SVDQ_DEVICE void store(float (&result)[kSums], const Factors& f, int first_row,
                           int first_token) {
        const u32 staged = shared.output(index), warp = threadIdx.x % 128 / 32;
        if (!T::kIsBf16) {
#pragma unroll
            for (int j = 0; j < kTokens / 8; ++j) {
                const uint4 tokens = token_factors(j);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    result[4 * j + i] *= as_float(i % 2 ? tokens.w : tokens.y);
            }
            warpgroup_sync(index);  // before the factors are written over
        }
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const u32 buffer = staged + piece % kBuffers * kPieceBytes;
            if (piece >= kBuffers) {
                if (threadIdx.x % 128 == 0) tensor_store_wait<kBuffers - 1>();
                warpgroup_sync(index);
            }
#pragma unroll
            for (int j = 0; j < kPiece / 8; j += 2) {
                u32 pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* from = result + 4 * (piece * (kPiece / 8) + j + i / 2) + i % 2 * 2;
                    pairs[i] = pack_saturated<T>(from[0] + f.bias[i % 2], from[1] + f.bias[i % 2]);
                }
                const u32 token = 8 * j + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
                store_matrices_transposed(buffer + token * 128 + (chunk ^ token % 8) * 16, pairs[0],
                                          pairs[1], pairs[2], pairs[3]);
            }
            fence_stores();
            warpgroup_sync(index);
            if (threadIdx.x % 128 == 0)
                tensor_store(p.out, 2 * first_row, first_token + piece * kPiece, buffer);
        }
    }
};

}  // namespace

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    svdq_gemm_wide(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Shared shared{shared_address(memory)};
    const Tiles tiles(p);

    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < kStages; ++slot) {
            barrier_init(shared.full(slot), 1);
            barrier_init(shared.empty(slot), kBlocks * kConsumers * 4);
        }
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
            const int row = tiles.row(turn), token = tiles.token(turn);
            const Consumer::Factors factors(p, row + consumer.row, token);
            float sum[kSums];
            u32 up[16];
            consumer.fetch_up(up, 0, row + consumer.row);
            consumer.multiply(sum);
            consumer.scale(sum, factors);
            consumer.low_rank(sum, up, row + consumer.row);
            consumer.store(sum, factors, row + consumer.index * 64, token);
        }
        if (threadIdx.x % 128 == 0) tensor_store_wait<0>();
    }
    __syncwarp();
    cluster_sync();  // nobody leaves while the other block may still write to its memory
}
