// y = act_scale[m] * weight_scale[n] * sum_k act[m, k] * weight[n, k] + down . proj_up^T + bias
//
// The second half of an SVDQuant W8A8 layer. One build of this file is one kernel, shaped by the
// macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// A scale is a whole row's, so sums over all of K are integers: the main loop is copies, ldmatrix
// and products, and all else happens once at its end. An int32 holds the sum over 133,000 columns.
//
// A stage of shared memory has 64 columns of K. Its rows of four 16-byte chunks are swizzled as in
// gemm_int4.cu, and columns of y are dealt to fragments as there: lane q of a quad owns the WN / 4
// columns from q * WN / 4 on, and outputs move 16 bytes at a time.
#include "epilogue.cuh"

#ifndef SVDQ_BM  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_BM 128
#    define SVDQ_BN 128
#    define SVDQ_WM 64
#    define SVDQ_WN 64
#    define SVDQ_STAGES 3
#    define SVDQ_MIN_BLOCKS 2
#endif

namespace {

constexpr int BM = SVDQ_BM, BN = SVDQ_BN, WM = SVDQ_WM, WN = SVDQ_WN;
constexpr int kStages = SVDQ_STAGES;

constexpr int kStep = 64;              // columns of K of a stage
constexpr int kProducts = kStep / 32;  // of a fragment and stage
constexpr int kChunks = 4, kRowBytes = kStep;
constexpr int kWarpsM = BM / WM, kWarpsN = BN / WN;
constexpr int kThreads = kWarpsM * kWarpsN * 32;
constexpr int MT = WM / 16, NT = WN / 8;  // fragments of a warp's tile
constexpr int kColumns = WN / 4;          // columns of a thread
constexpr int kBytesA = BM * kRowBytes, kBytesB = BN * kRowBytes;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kCopiesA = BM * kChunks / kThreads, kCopiesB = BN * kChunks / kThreads;
constexpr int kCopyRows = kThreads / kChunks;
static_assert(kCopyRows % 8 == 0, "a thread's copies share their swizzle");
static_assert(BM * kChunks % kThreads == 0 && BN * kChunks % kThreads == 0, "uneven copies");
static_assert(kColumns % 8 == 0 && NT % 2 == 0, "outputs move 16 bytes at a time");

struct Arguments {
    const u8* act;              // (M, K) int8
    const float* act_scale;     // (M,)
    const u16* down;            // (M, padded_rank)
    const float* down_scale;    // (M,) powers of two that `down` lacks; or null: all are 1
    const u8* weight;           // (N, K) int8
    const float* weight_scale;  // (N,)
    const u16* proj_up;         // (N, rank)
    const u16* bias;            // (N,) or null
    u16* out;                   // (M, N)
    int m, n, k, rank, padded_rank;
};

SVDQ_DEVICE constexpr int swizzle(int row) {
    return row / (8 / kChunks) % kChunks;
}

// The column of the block's tile that stands in row `s` of shared memory.
SVDQ_DEVICE constexpr int tile_column(int s) {
    int in_warp = s % WN;
    return s - in_warp + in_warp % 8 / 2 * kColumns + in_warp / 8 * 2 + in_warp % 2;
}

// Consecutive blocks take tiles from a band eight tiles high, so that those in flight together
// share rows and columns in the second-level cache.
SVDQ_DEVICE void block_tile(const Arguments& p, int& m0, int& n0) {
    constexpr int kBand = 8;
    int tiles_m = (p.m + BM - 1) / BM, tiles_n = (p.n + BN - 1) / BN;
    int band = blockIdx.x / (kBand * tiles_n);
    int height = min(kBand, tiles_m - band * kBand);
    int rest = blockIdx.x - band * kBand * tiles_n;
    m0 = (band * kBand + rest % height) * BM;
    n0 = rest / height * BN;
}

// From sums of products to outputs: scales, the low-rank branch, the bias.
SVDQ_DEVICE void finish(int (&sums)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int lane = threadIdx.x % 32, column = column0 + lane % 4 * kColumns;
    float act_scale[MT * 2], row_scale[MT * 2];
    load_row_scales<T>(row_scale, p, row0);
#pragma unroll
    for (int i = 0; i < MT * 2; ++i)
        act_scale[i] =
            p.act_scale[min(row0 + i * 8 + lane / 4, p.m - 1)] * inverse_power(row_scale[i]);
    float acc[MT][NT][4];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const float2 scale = column + 2 * nt < p.n
                                 ? *(const float2*)(p.weight_scale + column + 2 * nt)
                                 : make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < MT * 4; ++i)
            // Not infinite, or the low-rank branch could make it NaN.
            acc[i / 4][nt][i % 4] = saturate<Bf16>((float)sums[i / 4][nt][i % 4] *
                                                   (i % 2 ? scale.y : scale.x) * act_scale[i / 2]);
    }
    add_low_rank_and_bias<T>(acc, row_scale, p, row0, column0);
    store<T>(acc, p, row0, column0);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, SVDQ_MIN_BLOCKS)
    svdq_gemm_int8(const Arguments p) {
    extern __shared__ __align__(128) u8 shared[];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
    const u32 stage0 = shared_address(shared);

    int m0, n0;
    block_tile(p, m0, n0);
    const int iterations = p.k / kStep;

    // ---- copies into shared memory. A thread copies its chunk of rows kCopyRows apart; what does
    // not exist becomes 0.
    const int copy_chunk = tid % kChunks, copy_row = tid / kChunks;
    const u32 target = copy_row * kRowBytes + ((copy_chunk ^ swizzle(copy_row)) << 4);
    const int row_a = m0 + copy_row, row_b = n0 + tile_column(copy_row);
    const u8* from_a = p.act + (u64)p.k * row_a + copy_chunk * 16;
    const u8* from_b = p.weight + (u64)p.k * row_b + copy_chunk * 16;
    auto load_stage = [&](u32 stage) {
#pragma unroll
        for (int i = 0; i < kCopiesA; ++i)
            copy_or_zero<16>(stage + target + i * kCopyRows * kRowBytes,
                             from_a + (u64)p.k * (i * kCopyRows), row_a + i * kCopyRows < p.m);
#pragma unroll
        for (int i = 0; i < kCopiesB; ++i)
            copy_or_zero<16>(stage + kBytesA + target + i * kCopyRows * kRowBytes,
                             from_b + (u64)p.k * tile_column(i * kCopyRows),
                             row_b + tile_column(i * kCopyRows) < p.n);
        from_a += kStep;
        from_b += kStep;
    };

#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < iterations) load_stage(stage0 + s * kStageBytes);
        copy_commit();
    }

    // ---- the main loop
    const int fragment_row_a = warp_m * WM + lane % 16;
    const int fragment_row_b = warp_n * WN + lane / 16 * 8 + lane % 8;
    const u32 fragment_a =
        fragment_row_a * kRowBytes + ((lane / 16 ^ swizzle(fragment_row_a)) << 4);
    const u32 fragment_b =
        kBytesA + fragment_row_b * kRowBytes + ((lane / 8 % 2 ^ swizzle(fragment_row_b)) << 4);

    int sums[MT][NT][4] = {};
    u32 read = stage0;
#pragma unroll 1
    for (int i = 0; i < iterations; ++i) {
        copy_wait<kStages - 2>();
        __syncthreads();
        // Stage `read` is used while the one before it in the ring, used last time, is filled.
        if (i + kStages - 1 < iterations)
            load_stage((read == stage0 ? read + kStages * kStageBytes : read) - kStageBytes);
        copy_commit();
#pragma unroll
        for (int product = 0; product < kProducts; ++product) {
            u32 a[MT][4];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[mt], (read + fragment_a ^ product << 5) + mt * 16 * kRowBytes);
#pragma unroll
            for (int pair = 0; pair < NT / 2; ++pair) {
                u32 b[4];
                load_matrices(b, (read + fragment_b ^ product << 5) + pair * 16 * kRowBytes);
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    mma_8bit(sums[mt][2 * pair], a[mt], b[0], b[1]);
                    mma_8bit(sums[mt][2 * pair + 1], a[mt], b[2], b[3]);
                }
            }
        }
        read += kStageBytes;
        if (read == stage0 + kStages * kStageBytes) read = stage0;
    }
    finish(sums, p, m0 + warp_m * WM, n0 + warp_n * WN);
}
