// y = tensor_scale * channel_scale[n] * sum_k act[m, k] * weight[n, k] + down . proj_up^T + bias,
// act and weight E2M1 codes times an E4M3 scale for each 16 columns.
//
// The second half of an SVDQuant layer in NVFP4. One build of this file is one kernel, shaped by
// the macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// The kernel is written around Blackwell's block-scaled product of 16 x 64 and 64 x 8 codes. What
// its lanes hold (g = lane / 4, q = lane % 4):
//
//     left codes    row g      columns 8q .. 8q + 7   |   row g + 8, the same columns
//                   row g      columns 32 + 8q ..     |   row g + 8, the same columns
//     left scales   q even: row g, q odd: row g + 8; byte j is the scale of columns 16j .. 16j + 15
//                   (the instruction reads q = 0 and 1)
//     right codes   column g of y, k as a row of the left has columns: 8q .., 32 + 8q ..
//     right scales  column g, byte j as above (the instruction reads q = 0)
//     sums          rows g and g + 8, columns 2q and 2q + 1
//
// NATIVE builds run that instruction. The others multiply the same registers another way: codes and
// scales are widened to fp16, which holds their product exactly, for products of 16 columns with
// float32 sums. All else is the same code, so a card without the instruction tests what one with it
// runs.
//
// Which columns of y stand in which fragment is dealt as in gemm_int4.cu: lane q of a quad owns the
// WN / 4 columns from q * WN / 4 on, and outputs move 16 bytes at a time. So are the stages of
// shared memory and their swizzle. A stage has 128 columns of K:
//
//     codes of x  | codes of the weight | scales of x: (2, BM) words | of the weight: (8, BN) bytes
//     (BM, 64 B)    (BN, 64 B)            word: the four of a row      as in the file
#include "epilogue.cuh"
#include "nvfp4.cuh"

#ifndef SVDQ_NATIVE  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_NATIVE 0
#    define SVDQ_BM 128
#    define SVDQ_BN 128
#    define SVDQ_WM 64
#    define SVDQ_WN 64
#    define SVDQ_STAGES 2
#    define SVDQ_MIN_BLOCKS 2
#    define SVDQ_EPILOGUE 0
#endif

namespace {

constexpr int BM = SVDQ_BM, BN = SVDQ_BN, WM = SVDQ_WM, WN = SVDQ_WN;
constexpr int kStages = SVDQ_STAGES;

constexpr int kBlock = 64;  // columns of K of a product
constexpr int kBlocks = 2;  // of a stage
constexpr int kWarpsM = BM / WM, kWarpsN = BN / WN;
constexpr int kThreads = kWarpsM * kWarpsN * 32;
constexpr int MT = WM / 16, NT = WN / 8;  // fragments of a warp's tile
constexpr int kColumns = WN / 4;          // columns of a thread

constexpr int kChunks = 2 * kBlocks;  // 16-byte chunks in a row of a stage
constexpr int kRowBytes = 16 * kChunks;
constexpr int kBytesA = BM * kRowBytes, kBytesB = BN * kRowBytes;
constexpr int kBytesSa = kBlocks * BM * 4, kBytesSb = kBlocks * BN * 4;
constexpr int kStageBytes = kBytesA + kBytesB + kBytesSa + kBytesSb;
constexpr int kCopiesA = BM * kChunks / kThreads, kCopiesB = BN * kChunks / kThreads;
constexpr int kCopyRows = kThreads / kChunks;
static_assert(kCopyRows % 8 == 0, "a thread's copies share their swizzle");
static_assert(BM * kChunks % kThreads == 0 && BN * kChunks % kThreads == 0, "uneven copies");
static_assert(kBlocks * BM % kThreads == 0 && kBlocks * BN % kThreads == 0, "uneven copies");
static_assert(kColumns % 8 == 0 && NT % 2 == 0, "outputs move 16 bytes at a time");

struct Arguments {
    const u8* act;              // (M, K / 2)
    const u32* act_scale;       // (K / 64, M), four E4M3 each
    const u16* down;            // (M, padded_rank)
    const float* down_scale;    // (M,) powers of two that `down` lacks; or null: all are 1
    const u8* weight;           // (N, K / 2)
    const u8* weight_scale;     // (K / 16, N) E4M3
    const float* tensor_scale;  // one
    const u16* channel_scale;   // (N,) or null
    const u16* proj_up;         // (N, rank)
    const u16* bias;            // (N,) or null
    u16* out;                   // (M, N)
    int m, n, k, rank, padded_rank;
    // GELU + quantize: the next layer's inputs instead of `out`
    int next_rank, next_padded_rank;
    const u16* next_smooth;     // (N,)
    const u16* next_proj_down;  // (N, next_rank)
    u8* next_codes;             // (M, N / 2)
    u8* next_scale;             // (N / 64, M, 4) E4M3
    float* next_sums;           // (M, next_rank), zeroed
    u16* next_down;             // (M, next_padded_rank), zeros from next_rank on
    float* next_down_scale;     // (M,) powers of two; fp16 only
    u32* counters;              // zero, one for each BM rows
};

// ---- the product -------------------------------------------------------------------------------

#if SVDQ_NATIVE

struct Product {
    static constexpr int kSteps = 1;     // instructions for 64 columns
    static constexpr float kUnit = 1.f;  // what a sum is to be multiplied by
    struct Left {
        u32 codes[4], scale;
    };
    struct Right {
        u32 codes[2], scale;
    };

    static SVDQ_DEVICE u32 left_scale(u32 word) {
        return word;
    }
    static SVDQ_DEVICE u32 right_scale(u32 word) {
        return word;
    }
    static SVDQ_DEVICE Left left(const u32 (&codes)[4], u32 scale, int) {
        return {{codes[0], codes[1], codes[2], codes[3]}, scale};
    }
    static SVDQ_DEVICE Right right(u32 first, u32 second, u32 scale, int) {
        return {{first, second}, scale};
    }
    static SVDQ_DEVICE void add(float (&sum)[4], const Left& a, const Right& b) {
        asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1."
            "e2m1.f32.ue4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "
            "{%10}, {0, 0}, {%11}, {0, 0};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a.codes[0]), "r"(a.codes[1]), "r"(a.codes[2]), "r"(a.codes[3]), "r"(b.codes[0]),
              "r"(b.codes[1]), "r"(a.scale), "r"(b.scale));
    }
};

#else

struct Product {
    static constexpr int kSteps = 4;
    static constexpr float kUnit = 16384.f;  // a factor is 2^-7 of what it stands for
    struct Left {
        u32 pairs[4];
    };
    struct Right {
        u32 pairs[2];
    };

    // A lane's columns 8q .. and 32 + 8q .. are of groups q / 2 and 2 + q / 2. Their scales: of row
    // g in the low bytes, of row g + 8 in the high.
    static SVDQ_DEVICE u32 left_scale(u32 word) {
        const u32 q = threadIdx.x % 4, other = __shfl_xor_sync(0xFFFFFFFFu, word, 1);
        return __byte_perm(q % 2 ? other : word, q % 2 ? word : other, 0x6420 + q / 2 * 0x1111);
    }
    static SVDQ_DEVICE u32 right_scale(u32 word) {
        return __byte_perm(word, 0, 0x4420 + threadIdx.x % 4 / 2 * 0x11);
    }
    // A scale, twice, times 2^7.
    static SVDQ_DEVICE u32 widened_scale(u32 scales, int byte) {
        return multiply_pairs(__byte_perm(scales, 0, 0x4040 + byte * 0x0101) << 7, 0x78007800u);
    }
    // Codes i and i + 4 of a word, times 2^-14.
    static SVDQ_DEVICE u32 widened_codes(u32 word, int i) {
        const u32 sign = word << (12 - 4 * i), rest = i == 3 ? word >> 3 : word << (9 - 4 * i);
        return (sign & 0x80008000u) | (rest & 0x0E000E00u);
    }

    // Step s takes codes i and i + 4 for i = 2 (s % 2) and the next, of the columns' half s / 2.
    static SVDQ_DEVICE Left left(const u32 (&codes)[4], u32 scale, int step) {
        Left a;
#    pragma unroll
        for (int row = 0; row < 2; ++row) {
            const u32 by = widened_scale(scale, 2 * row + step / 2);
#    pragma unroll
            for (int i = 0; i < 2; ++i)
                a.pairs[2 * i + row] =
                    multiply_pairs(widened_codes(codes[step / 2 * 2 + row], step % 2 * 2 + i), by);
        }
        return a;
    }
    static SVDQ_DEVICE Right right(u32 first, u32 second, u32 scale, int step) {
        const u32 by = widened_scale(scale, step / 2), codes = step / 2 ? second : first;
        return {{multiply_pairs(widened_codes(codes, step % 2 * 2), by),
                 multiply_pairs(widened_codes(codes, step % 2 * 2 + 1), by)}};
    }
    static SVDQ_DEVICE void add(float (&sum)[4], const Left& a, const Right& b) {
        mma_16bit<Fp16>(sum, a.pairs, b.pairs[0], b.pairs[1]);
    }
};

#endif

// ---- tiles -------------------------------------------------------------------------------------

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

// A thread's columns of scales in shared memory.
SVDQ_DEVICE void load_scales(u32 (&bytes)[kColumns / 4], u32 from) {
    if constexpr (kColumns == 16) {
        const uint4 v = load_shared16(from);
        bytes[0] = v.x, bytes[1] = v.y, bytes[2] = v.z, bytes[3] = v.w;
    } else {
#pragma unroll
        for (int c = 0; c < kColumns / 4; ++c)
            bytes[c] = load_shared4(from + c * 4);
    }
}

// From sums of products to outputs: scales, the low-rank branch, the bias.
SVDQ_DEVICE void finish(float (&acc)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int column = column0 + threadIdx.x % 4 * kColumns;
    float row_scale[MT * 2];
    load_row_scales<T>(row_scale, p, row0);
    u32 channel[NT] = {};
    if (p.channel_scale) load_row(channel, p.channel_scale + column, p.n - column);
    const float unit = *p.tensor_scale * Product::kUnit;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const float low = p.channel_scale ? unit * T::low(channel[nt]) : unit;
        const float high = p.channel_scale ? unit * T::high(channel[nt]) : unit;
#pragma unroll
        for (int i = 0; i < MT * 4; ++i) {
            float& sum = acc[i / 4][nt][i % 4];
            sum *= i % 2 ? high : low;
            if (!T::kIsBf16) sum *= inverse_power(row_scale[i / 2]);
        }
    }
    add_low_rank_and_bias<T>(acc, row_scale, p, row0, column0);
}

// ---- epilogues -------------------------------------------------------------------------------

#if SVDQ_EPILOGUE == 1  // GELU + quantize

static_assert(kColumns == 16, "a lane quantizes whole groups");

// The next layer's inputs, as svdq_quantize_nvfp4 would make them of GELU(y): codes, their scales
// (a lane's 16 columns are a group), and the product with proj_down, to which the blocks of a row
// each add their part. Shared memory, the stages done with, is used for it.
SVDQ_DEVICE void gelu_quantize(const float (&acc)[MT][NT][4], const Arguments& p, int row0,
                               int column0, u8* shared) {
    constexpr int kRankChunk = 32;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int column = column0 + q * kColumns;
    u32 smooth[NT] = {};
    load_row(smooth, p.next_smooth + column, p.n - column);
    float inverse_smooth[kColumns];
#    pragma unroll
    for (int j = 0; j < kColumns; ++j)
        inverse_smooth[j] = reciprocal(j % 2 ? T::high(smooth[j / 2]) : T::low(smooth[j / 2]));

    u32 pairs[MT * 2][NT];
#    pragma unroll
    for (int i = 0; i < MT * 2; ++i) {
#    pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const float* y = &acc[i / 2][nt][i % 2 * 2];
            pairs[i][nt] = T::pack(gelu_tanh(saturate<T>(y[0])), gelu_tanh(saturate<T>(y[1])));
        }
        float steps[kColumns];
        const u32 code = scale_group<T>(pairs[i], inverse_smooth, steps);
        const int row = row0 + i * 8 + g;
        if (row >= p.m || column >= p.n) continue;
        *(uint2*)(p.next_codes + ((u64)row * p.n + column) / 2) =
            code ? make_uint2(e2m1_codes(steps), e2m1_codes(steps + 8)) : make_uint2(0, 0);
        p.next_scale[((u64)(column / 64) * p.m + row) * 4 + q] = (u8)code;
    }

    // GELU(y) . proj_down, as in gemm_int4.cu: the outputs of a product are laid out as the left
    // operand of another, and fragment step s of lane q holds columns 16q + 4s .. + 3. Shared
    // memory has 32 ranks of the block's BN rows of proj_down, row k's chunk c at c ^ k / 16 % 4.
    const int warp_column = column0 % BN;
    const int fragment_row = warp_column + lane % 8 / 2 * kColumns + lane % 2 + lane / 8 % 2 * 2;
    for (int rank0 = 0; rank0 < p.next_rank; rank0 += kRankChunk) {
        __syncthreads();
        for (int i = threadIdx.x; i < BN * 4; i += kThreads) {
            const int k = i / 4, chunk = i % 4, n = column0 - warp_column + k;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (n < p.n && rank0 + chunk * 8 < p.next_rank)
                v = *(const uint4*)(p.next_proj_down + (u64)n * p.next_rank + rank0 + chunk * 8);
            *(uint4*)(shared + k * 64 + ((chunk ^ k / 16 % 4) << 4)) = v;
        }
        __syncthreads();
#    pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            float sum[kRankChunk / 8][4] = {};
#    pragma unroll
            for (int s = 0; s < NT / 2; ++s) {
                const u32 a[4] = {pairs[2 * mt][2 * s], pairs[2 * mt + 1][2 * s],
                                  pairs[2 * mt][2 * s + 1], pairs[2 * mt + 1][2 * s + 1]};
#    pragma unroll
                for (int t = 0; t < kRankChunk / 8; t += 2) {
                    const int k = fragment_row + 4 * s, chunk = t + lane / 16;
                    u32 b[4];
                    load_matrices_transposed(
                        b, shared_address(shared) + k * 64 + ((chunk ^ k / 16 % 4) << 4));
                    mma_16bit<T>(sum[t], a, b[0], b[1]);
                    mma_16bit<T>(sum[t + 1], a, b[2], b[3]);
                }
            }
#    pragma unroll
            for (int i = 0; i < kRankChunk / 2; ++i) {
                const int row = row0 + mt * 16 + g + i % 4 / 2 * 8;
                const int rank = rank0 + i / 4 * 8 + q * 2 + i % 2;
                if (row < p.m && rank < p.next_rank)
                    atomicAdd(p.next_sums + (u64)row * p.next_rank + rank, sum[i / 4][i % 4]);
            }
        }
    }
}

// Of the blocks that share rows, the one that finishes last rounds their sums to 16 bits, for fp16
// into its range by a power of two for each row. Eight lanes take a row.
SVDQ_DEVICE void write_next_down(const Arguments& p, int m0, u8* shared) {
    const int tid = threadIdx.x;
    __threadfence();
    __syncthreads();
    if (tid == 0) {
        const u32 others = (p.n + BN - 1) / BN - 1;
        const bool last = atomicAdd(p.counters + m0 / BM, 1u) == others;
        if (last) p.counters[m0 / BM] = 0;  // as the next launch needs it
        *(u32*)shared = last;
    }
    __syncthreads();
    if (!*(u32*)shared) return;
    __threadfence();
#    pragma unroll 1
    for (int first = 0; first < BM; first += kThreads / 8) {
        const int row = m0 + first + tid / 8;
        const float* sums = p.next_sums + (u64)min(row, p.m - 1) * p.next_rank;
        float scale = 1.f;
        if (!T::kIsBf16) {
            float largest = 0.f;
            for (int rank = tid % 8 * 4; rank < p.next_rank; rank += 32) {
                const float4 v = __ldcg((const float4*)(sums + rank));
                largest = fmaxf(fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y))),
                                fmaxf(fabsf(v.z), fabsf(v.w)));
            }
            largest = quad_max(largest);
            scale = down_power(fmaxf(largest, shuffle_xor(largest, 4)));
            if (row < p.m && tid % 8 == 0) p.next_down_scale[row] = inverse_power(scale);
        }
        if (row >= p.m) continue;
        for (int rank = tid % 8 * 4; rank < p.next_padded_rank; rank += 32) {
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            if (rank < p.next_rank) v = __ldcg((const float4*)(sums + rank));
            *(uint2*)(p.next_down + (u64)row * p.next_padded_rank + rank) = make_uint2(
                pack_down<T>(v.x * scale, v.y * scale), pack_down<T>(v.z * scale, v.w * scale));
        }
    }
}

SVDQ_DEVICE void write(const float (&acc)[MT][NT][4], const Arguments& p, int m0, int row0,
                       int column0, u8* shared) {
    copy_wait<0>();  // no copy may land in shared memory any more
    gelu_quantize(acc, p, row0, column0, shared);
    if (p.next_rank) write_next_down(p, m0, shared);
}

#else

SVDQ_DEVICE void write(const float (&acc)[MT][NT][4], const Arguments& p, int, int row0,
                       int column0, u8*) {
    store<T>(acc, p, row0, column0);
}

#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, SVDQ_MIN_BLOCKS)
    svdq_gemm_nvfp4(const Arguments p) {
    extern __shared__ __align__(128) u8 shared[];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int g = lane / 4, q = lane % 4;
    const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
    const u32 stage0 = shared_address(shared);

    int m0, n0;
    block_tile(p, m0, n0);
    const int blocks = p.k / kBlock;
    const int iterations = (blocks + kBlocks - 1) / kBlocks;

    // ---- copies into shared memory. A thread copies its chunk of rows kCopyRows apart; which they
    // are is worked out for each stage again, or it would cost registers in between. What does not
    // exist becomes 0.
    auto load_stage = [&](u32 stage, int first) {
        const int thread = read_thread_again();
        const int copy_chunk = thread % kChunks, copy_row = thread / kChunks;
        const u32 target = stage + copy_row * kRowBytes + ((copy_chunk ^ swizzle(copy_row)) << 4);
        const u32 row_bytes = p.k / 2;
        const int row_a = m0 + copy_row, row_b = n0 + tile_column(copy_row);
        const bool held = first + copy_chunk / 2 < blocks;
        const u32 offset = first * (kBlock / 2) + copy_chunk * 16;
        const u8* from_a = p.act + (u64)row_bytes * row_a + offset;
        const u8* from_b = p.weight + (u64)row_bytes * row_b + offset;
#pragma unroll
        for (int i = 0; i < kCopiesA; ++i)
            copy_or_zero<16>(target + i * kCopyRows * kRowBytes,
                             from_a + (u64)row_bytes * (i * kCopyRows),
                             held && row_a + i * kCopyRows < p.m);
#pragma unroll
        for (int i = 0; i < kCopiesB; ++i)
            copy_or_zero<16>(target + kBytesA + i * kCopyRows * kRowBytes,
                             from_b + (u64)row_bytes * tile_column(i * kCopyRows),
                             held && row_b + tile_column(i * kCopyRows) < p.n);
        const u32 scales = stage + kBytesA + kBytesB;
#pragma unroll
        for (int i = 0; i < kBlocks * BM / kThreads; ++i) {
            const int word = thread + i * kThreads, block = first + word / BM, row = m0 + word % BM;
            copy_or_zero<4>(scales + word * 4, p.act_scale + (u64)block * p.m + row,
                            block < blocks && row < p.m);
        }
#pragma unroll
        for (int i = 0; i < kBlocks * BN / kThreads; ++i) {
            const int word = thread + i * kThreads, group = first * 4 + word / (BN / 4);
            const int column = n0 + word % (BN / 4) * 4;
            copy_or_zero<4>(scales + kBytesSa + word * 4,
                            p.weight_scale + (u64)group * p.n + column,
                            group < blocks * 4 && column < p.n);
        }
    };

#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < iterations) load_stage(stage0 + s * kStageBytes, s * kBlocks);
        copy_commit();
    }

    // ---- the main loop
    const int fragment_row_a = warp_m * WM + lane % 16;
    const int fragment_row_b = warp_n * WN + lane / 16 * 8 + lane % 8;
    const u32 fragment_a =
        fragment_row_a * kRowBytes + ((lane / 16 ^ swizzle(fragment_row_a)) << 4);
    const u32 fragment_b =
        kBytesA + fragment_row_b * kRowBytes + ((lane / 8 % 2 ^ swizzle(fragment_row_b)) << 4);
    const u32 scales_a = kBytesA + kBytesB + (warp_m * WM + g + q % 2 * 8) * 4;
    // Of the weight's scales a lane reads the quad pair's columns; every other byte is its own.
    const u32 scales_b = kBytesA + kBytesB + kBytesSa + warp_n * WN + g / 2 * kColumns;
    const u32 select = 0x40 + g % 2 * 0x11;

    float acc[MT][NT][4] = {};
    u32 read = stage0;
#pragma unroll 1
    for (int i = 0; i < iterations; ++i) {
        copy_wait<kStages - 2>();
        __syncthreads();
        // Stage `read` is used while the one before it in the ring, used last time, is filled.
        if (i + kStages - 1 < iterations)
            load_stage((read == stage0 ? read + kStages * kStageBytes : read) - kStageBytes,
                       (i + kStages - 1) * kBlocks);
        copy_commit();

#pragma unroll 1
        for (int block = 0; block < kBlocks; ++block) {
            u32 sa[MT], sb[NT], bytes[4][kColumns / 4];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                sa[mt] =
                    Product::left_scale(load_shared4(read + scales_a + (block * BM + mt * 16) * 4));
#pragma unroll
            for (int j = 0; j < 4; ++j)
                load_scales(bytes[j], read + scales_b + (block * 4 + j) * BN);
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                const u32 selected = select + nt % 2 * 0x22;
                sb[nt] = Product::right_scale(
                    __byte_perm(__byte_perm(bytes[0][nt / 2], bytes[1][nt / 2], selected),
                                __byte_perm(bytes[2][nt / 2], bytes[3][nt / 2], selected), 0x5410));
            }
            u32 a[MT][4];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[mt], (read + fragment_a ^ block << 5) + mt * 16 * kRowBytes);
#pragma unroll
            for (int step = 0; step < Product::kSteps; ++step) {
                typename Product::Left left[MT];
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
                    left[mt] = Product::left(a[mt], sa[mt], step);
#pragma unroll
                for (int pair = 0; pair < NT / 2; ++pair) {
                    u32 b[4];
                    load_matrices(b, (read + fragment_b ^ block << 5) + pair * 16 * kRowBytes);
#pragma unroll
                    for (int nt = 2 * pair; nt < 2 * pair + 2; ++nt) {
                        const u32* codes = b + nt % 2 * 2;
                        const auto right = Product::right(codes[0], codes[1], sb[nt], step);
#pragma unroll
                        for (int mt = 0; mt < MT; ++mt)
                            Product::add(acc[mt][nt], left[mt], right);
                    }
                }
            }
        }
        read += kStageBytes;
        if (read == stage0 + kStages * kStageBytes) read = stage0;
    }
    const int row0 = m0 + warp_m * WM, column0 = n0 + warp_n * WN;
    finish(acc, p, row0, column0);
    write(acc, p, m0, row0, column0, shared);
}
