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
#include "nvfp4.cuh"

#ifndef SVDQ_BF16  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_BF16 1
#    define SVDQ_NATIVE 0
#    define SVDQ_BM 128
#    define SVDQ_BN 128
#    define SVDQ_WM 64
#    define SVDQ_WN 64
#    define SVDQ_STAGES 2
#    define SVDQ_MIN_BLOCKS 2
#endif

namespace {

#if SVDQ_BF16
using T = Bf16;
#else
using T = Fp16;
#endif
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

// A thread's columns of a vector in global memory, of which `columns` exist.
SVDQ_DEVICE void load_row(u32 (&pairs)[kColumns / 2], const u16* from, int columns) {
#pragma unroll
    for (int j = 0; j < kColumns / 2; j += 4)
        if (2 * j < columns) {
            uint4 v = *(const uint4*)(from + 2 * j);
            pairs[j] = v.x, pairs[j + 1] = v.y, pairs[j + 2] = v.z, pairs[j + 3] = v.w;
        }
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

// sums += down . proj_up^T for a warp's tile. Any order of the rank's columns gives the same sum,
// so lane q takes columns 4q .. 4q + 3 of each 16 as its four: one vector load a row.
SVDQ_DEVICE void project_up(float (&acc)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (int k = 4 * q; k - 4 * q < p.rank; k += 16) {
        uint2 b[NT];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const int n = min(column0 + g / 2 * kColumns + nt * 2 + g % 2, p.n - 1);
            b[nt] = k < p.rank ? *(const uint2*)(p.proj_up + (u64)n * p.rank + k) : uint2{0, 0};
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const int m = row0 + mt * 16 + g;
            const uint2 low = *(const uint2*)(p.down + (u64)min(m, p.m - 1) * p.padded_rank + k);
            const uint2 high =
                *(const uint2*)(p.down + (u64)min(m + 8, p.m - 1) * p.padded_rank + k);
            const u32 a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
                mma_16bit<T>(acc[mt][nt], a, b[nt].x, b[nt].y);
        }
    }
}

// From sums of products to outputs: scales, the low-rank branch, the bias.
SVDQ_DEVICE void finish(float (&acc)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const int column = column0 + lane % 4 * kColumns;
    // Rows whose `down` was scaled into fp16's range are scaled alike while it is added.
    float row_scale[MT][2];
#pragma unroll
    for (int i = 0; i < MT * 2; ++i)
        row_scale[i / 2][i % 2] =
            !T::kIsBf16 && p.down_scale ? p.down_scale[min(row0 + i * 8 + g, p.m - 1)] : 1.f;
    u32 channel[kColumns / 2] = {}, bias[kColumns / 2] = {};
    if (p.channel_scale) load_row(channel, p.channel_scale + column, p.n - column);
    if (p.bias) load_row(bias, p.bias + column, p.n - column);
    const float unit = *p.tensor_scale * Product::kUnit;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const float low = p.channel_scale ? unit * T::low(channel[nt]) : unit;
        const float high = p.channel_scale ? unit * T::high(channel[nt]) : unit;
#pragma unroll
        for (int i = 0; i < MT * 4; ++i) {
            float& sum = acc[i / 4][nt][i % 4];
            sum *= i % 2 ? high : low;
            if (!T::kIsBf16) sum *= as_float(0x7F000000u - as_bits(row_scale[i / 4][i % 4 / 2]));
        }
    }
    if (p.rank) project_up(acc, p, row0, column0);
#pragma unroll
    for (int i = 0; i < MT * 2; ++i) {
        const int row = row0 + i * 8 + g;
        const float scale = T::kIsBf16 ? 1.f : row_scale[i / 2][i % 2];
        u32 pairs[NT];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const float* sum = &acc[i / 2][nt][i % 2 * 2];
            pairs[nt] = T::pack(saturate<T>(fmaf(sum[0], scale, T::low(bias[nt]))),
                                saturate<T>(fmaf(sum[1], scale, T::high(bias[nt]))));
        }
        if (row >= p.m) continue;
#pragma unroll
        for (int j = 0; j < NT; j += 4)
            if (column + 2 * j < p.n)
                *(uint4*)(p.out + (u64)row * p.n + column + 2 * j) =
                    make_uint4(pairs[j], pairs[j + 1], pairs[j + 2], pairs[j + 3]);
    }
}

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
    finish(acc, p, m0 + warp_m * WM, n0 + warp_n * WN);
}
