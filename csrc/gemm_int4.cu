// y = sum over groups g of  act_scale[g, m] * weight_scale[g, n] * (qact . weight over the group)
//     + down . proj_up^T + bias
//
// The second half of an SVDQuant W4A4 layer. One build of this file is one kernel, shaped by the
// macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// A warp owns a tile of WM x WN outputs and keeps it in float32 registers. Codes come straight from
// the file's layout (row-major, two columns a byte): a 16 x 64 tile of 4-bit codes is 16 rows of
// 32 bytes, which is what ldmatrix and mma.m16n8k64 take. Three ideas carry the main loop:
//
// 1. No integer-to-float conversion. Each group's integer accumulator starts at 0x4B400000, which
//    read as a float is 12582912 = 3 * 2^22; adding i to the bits adds i to the float. The scale
//    then removes the offset for free:  fma(f, sw, -12582912 * sw) = i * sw  exactly, as sw has 11
//    bits or fewer and 12582912 two. Two FFMA an accumulator and group: that one, and acc = fma(i *
//    sw, sx, acc).
//
// 2. Rows and columns are dealt to fragments so that a thread's scales are consecutive. A fragment
//    gives lane (g = lane / 4, q = lane % 4) the rows g, g + 8 and the columns 2q, 2q + 1 of each
//    16 x 8 product. Which row of the tile stands in which row of the fragment is ours to say:
//
//        tile row     g * (WM / 8) + i       ->  fragment i / 2, row g + 8 (i % 2)
//        tile column  q * (WN / 4) + j       ->  fragment j / 2, column 2q + j % 2
//
//    so lane (g, q) owns the WM/8 rows from g * WM/8 on and the WN/4 columns from q * WN/4 on: its
//    scales, bias and outputs are contiguous and move 16 bytes at a time. The reordering costs
//    nothing: it is made by the addresses of the copies into shared memory.
//
// 3. Shared memory is a ring of groups, each with its codes and its scales in one piece: a single
//    address moves through it, and all others are a constant away from that. cp.async fills it
//    GROUPS groups at a time, a stage, STAGES - 1 of them ahead. The two 16-byte chunks of a row
//    change places in every other four rows, which puts the eight rows of an ldmatrix into eight
//    different 16-byte columns of a 128-byte line:
//
//        line 0:  r0c0 r0c1 r1c0 r1c1 r2c0 r2c1 r3c0 r3c1
//        line 1:  r4c1 r4c0 r5c1 r5c0 r6c1 r6c0 r7c1 r7c0
#include "codes.cuh"
#include "device.cuh"

#ifndef SVDQ_UNSIGNED  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_UNSIGNED 0
#    define SVDQ_BM 128
#    define SVDQ_BN 128
#    define SVDQ_WM 64
#    define SVDQ_WN 64
#    define SVDQ_GROUPS 2
#    define SVDQ_STAGES 2
#    define SVDQ_MIN_BLOCKS 2
#    define SVDQ_EVEN 0
#    define SVDQ_EPILOGUE 0
#endif

namespace {

constexpr bool kUnsigned = SVDQ_UNSIGNED;
constexpr int BM = SVDQ_BM, BN = SVDQ_BN, WM = SVDQ_WM, WN = SVDQ_WN;
constexpr int kGroups = SVDQ_GROUPS, kStages = SVDQ_STAGES;

enum Epilogue { kStore = 0, kGeluQuantize = 1, kNormRope = 2 };
constexpr Epilogue kEpilogue = (Epilogue)SVDQ_EPILOGUE;

constexpr bool kEven = SVDQ_EVEN;  // M is a multiple of 4, N one of BN

constexpr int kWarpsM = BM / WM, kWarpsN = BN / WN;
constexpr int kThreads = kWarpsM * kWarpsN * 32;
constexpr int MT = WM / 16, NT = WN / 8;          // fragments of a warp's tile
constexpr int kRows = WM / 8, kColumns = WN / 4;  // rows and columns of a thread
constexpr u32 kMagic = 0x4B400000u;
constexpr float kMagicFloat = 12582912.f;

// A group in shared memory: a's codes, b's codes, a's scales, b's scales.
constexpr int kRowBytes = kGroup / 2;
constexpr int kBytesA = BM * kRowBytes, kBytesB = BN * kRowBytes;
constexpr int kBytesSx = BM * 4, kBytesSw = BN * 2;
constexpr int kGroupBytes = kBytesA + kBytesB + kBytesSx + kBytesSw;
constexpr int kStageBytes = kGroups * kGroupBytes, kRingBytes = kStages * kStageBytes;
static_assert(kGroupBytes % 128 == 0, "a group starts where a line does");

// 16-byte slots of a group that are filled at once: both chunks of kCopyRows rows.
constexpr int kSlots = kThreads / kGroups, kCopyRows = kSlots / 2;
constexpr int kCopiesA = BM / kCopyRows, kCopiesB = BN / kCopyRows;
constexpr int kSlotsSx = kBytesSx / 16, kSlotsSw = kBytesSw / 16;
static_assert(kCopyRows % 8 == 0, "a thread's copies share their swizzle");
static_assert(BM % kCopyRows == 0 && BN % kCopyRows == 0, "uneven copies");
static_assert(kSlotsSx + kSlotsSw <= kSlots, "one slot a thread for the scales");
static_assert(kEpilogue != kGeluQuantize || WN == kGroup, "a warp quantizes whole groups");
static_assert(kEpilogue != kNormRope || BN == 128, "a block normalizes whole heads");
static_assert(NT % 2 == 0, "weight fragments are loaded in pairs");

struct Arguments {
    const u8* qact;           // (M, K / 2)
    const float* act_scale;   // (K / 64, M)
    const float* down;        // (M, rank)
    const u8* weight;         // (N, K / 2)
    const u16* weight_scale;  // (K / 64, N)
    const u16* proj_up;       // (N, rank)
    const u16* bias;          // (N,) or null
    u16* out;                 // (M, N)
    int m, n, k, rank;
    // kGeluQuantize: the next layer's inputs instead of `out`
    const u16* next_smooth;     // (N,)
    const u16* next_proj_down;  // (N, next_rank)
    u8* next_qact;              // (M, N / 2)
    float* next_scale;          // (N / 64, M)
    float* next_down;           // (M, next_rank), zeroed
    int next_rank;
    // kNormRope
    int norm_columns;   // columns [0, this) are q, [this, 2 * this) k, the rest as they are
    const u16* norm_q;  // (128,)
    const u16* norm_k;  // (128,)
    const float* rope;  // (rope_rows, 64, 2, 2): a matrix for each pair of columns
    float norm_epsilon;
    int rope_rows;  // after as many rows they begin again
};

SVDQ_DEVICE constexpr int swizzle(int row) {
    return row / 4 % 2;
}

// The row of the block's tile that stands in row `s` of shared memory, and for columns likewise.
SVDQ_DEVICE constexpr int tile_row(int s) {
    int in_warp = s % WM;
    return s - in_warp + in_warp % 8 * kRows + in_warp / 8;
}
SVDQ_DEVICE constexpr int tile_column(int s) {
    int in_warp = s % WN;
    return s - in_warp + in_warp % 8 / 2 * kColumns + in_warp / 8 * 2 + in_warp % 2;
}

// The compiler takes `value` as new: nothing that it worked out from it before is kept in a
// register.
SVDQ_DEVICE void renew(int& value) {
    asm volatile("" : "+r"(value));
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

// Four consecutive elements of a row of a low-rank factor, zeros from `rank` (a multiple of 4) on.
SVDQ_DEVICE float4 load_down(const float* row, int k, int rank) {
    return k < rank ? *(const float4*)(row + k) : make_float4(0, 0, 0, 0);
}
SVDQ_DEVICE uint2 load_up(const u16* row, int k, int rank) {
    return k < rank ? *(const uint2*)(row + k) : make_uint2(0, 0);
}

SVDQ_DEVICE float largest_of(float4 v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

// acc = down . proj_up^T for a warp's tile, `down` rounded to 16 bits.
//
// Any order of the rank's columns gives the same sum, so lane q takes columns 4q .. 4q + 3 of each
// 16 as its four: one vector load a row.
//
// fp16 does not have float32's range. When the tile's largest value is outside what fp16 holds
// well, the product is made again with `down` scaled by a power of two, and the result scaled back.
SVDQ_DEVICE void project_up(float (&acc)[MT][NT][4], const Arguments& p, int row0, int column0) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float scale = 1.f;
    while (true) {
        float largest = 0.f;
        for (int k = 4 * q; k - 4 * q < p.rank; k += 16) {
            u32 b[NT][2];
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                int n = column0 + g / 2 * kColumns + nt * 2 + g % 2;
                uint2 v = load_up(p.proj_up + (u64)min(n, p.n - 1) * p.rank, k, p.rank);
                b[nt][0] = v.x;
                b[nt][1] = v.y;
            }
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                u32 a[4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int m = min(row0 + g * kRows + mt * 2 + h, p.m - 1);
                    float4 v = load_down(p.down + (u64)m * p.rank, k, p.rank);
                    largest = fmaxf(largest, largest_of(v));
                    a[h] = T::pack(saturate<T>(v.x * scale), saturate<T>(v.y * scale));
                    a[2 + h] = T::pack(saturate<T>(v.z * scale), saturate<T>(v.w * scale));
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt)
                    mma_16bit<T>(acc[mt][nt], a, b[nt][0], b[nt][1]);
            }
        }
#if SVDQ_BF16
        return;
#else
        if (scale != 1.f) break;
        bool fits = largest == 0.f || (largest <= 65504.f && largest >= 0.000244140625f);
        if (__all_sync(0xFFFFFFFFu, fits)) return;
#    pragma unroll
        for (int mask = 16; mask; mask /= 2)
            largest = fmaxf(largest, shuffle_xor(largest, mask));
        // 2^(14 - exponent of the largest), within what a float's exponent can say.
        int exponent = max(141 - (int)(as_bits(largest) >> 23), -112);
        scale = as_float((u32)(min(exponent, 126) + 127) << 23);
        if (scale == 1.f) return;
#    pragma unroll
        for (int i = 0; i < MT * NT * 4; ++i)
            (&acc[0][0][0])[i] = 0.f;
#endif
    }
    float inverse = as_float(0x7F000000u - as_bits(scale));
#pragma unroll
    for (int i = 0; i < MT * NT * 4; ++i)
        (&acc[0][0][0])[i] *= inverse;
}

// Output j of row i of those that a thread holds.
SVDQ_DEVICE float element(const float (&acc)[MT][NT][4], int i, int j) {
    return acc[i / 2][j / 2][i % 2 * 2 + j % 2];
}

// A thread's columns of a row in global memory, of which `columns` exist.
SVDQ_DEVICE void load_row(u32 (&pairs)[kColumns / 2], const u16* from, int columns) {
#pragma unroll
    for (int j = 0; j < kColumns / 2; j += 4)
        if (kEven || 2 * j < columns) {
            uint4 v = *(const uint4*)(from + 2 * j);
            pairs[j] = v.x, pairs[j + 1] = v.y, pairs[j + 2] = v.z, pairs[j + 3] = v.w;
        }
}
SVDQ_DEVICE void store_row(u16* to, const u32 (&pairs)[kColumns / 2], int columns) {
#pragma unroll
    for (int j = 0; j < kColumns / 2; j += 4)
        if (kEven || 2 * j < columns)
            *(uint4*)(to + 2 * j) = make_uint4(pairs[j], pairs[j + 1], pairs[j + 2], pairs[j + 3]);
}

// A thread holds kColumns consecutive outputs of each of its rows. Where it stands is worked out
// again here, behind the compiler's back: kept through the main loop it would cost registers there.
struct Position {
    int row, column;  // of the thread's first output
    int warp_n, lane;

    SVDQ_DEVICE explicit Position(u32 tile) {
        const int tid = read_thread_again(), warp = tid / 32;
        lane = tid % 32;
        warp_n = warp / kWarpsM;
        row = (int)load_shared4(tile) + warp % kWarpsM * WM + lane / 4 * kRows;
        column = (int)load_shared4(tile + 4) + warp_n * WN + lane % 4 * kColumns;
    }
};

SVDQ_DEVICE void add_bias(float (&acc)[MT][NT][4], const Arguments& p, const Position& at) {
    if (!p.bias) return;
    u32 bias[kColumns / 2] = {};
    load_row(bias, p.bias + at.column, p.n - at.column);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns / 2; ++j) {
            acc[i / 2][j][i % 2 * 2] += T::low(bias[j]);
            acc[i / 2][j][i % 2 * 2 + 1] += T::high(bias[j]);
        }
}

// kStore: the outputs in 16 bits.
SVDQ_DEVICE void store(float (&acc)[MT][NT][4], const Arguments& p, const Position& at) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        u32 pairs[kColumns / 2];
#pragma unroll
        for (int j = 0; j < kColumns / 2; ++j)
            pairs[j] = T::pack(saturate<T>(element(acc, i, 2 * j)),
                               saturate<T>(element(acc, i, 2 * j + 1)));
        if (at.row + i < p.m)
            store_row(p.out + (u64)(at.row + i) * p.n + at.column, pairs, p.n - at.column);
    }
}

// kNormRope: the same, but each head of 128 columns of q and of k is first divided by its root mean
// square, weighted, and rotated by position. A block's tile is one head wide. Behind q and k there
// may be anything, such as a single block's first layer has.
SVDQ_DEVICE void norm_rope(float (&acc)[MT][NT][4], const Arguments& p, const Position& at,
                           float* sums) {
    const int kind = at.column / p.norm_columns, head_column = at.column % BN;
    if (kind < 2) {  // the same for the whole block
        const int tile_row0 = at.row % BM;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                sum = fmaf(element(acc, i, j), element(acc, i, j), sum);
            sum = quad_sum(sum);
            if (at.lane % 4 == 0) sums[(tile_row0 + i) * kWarpsN + at.warp_n] = sum;
        }
        __syncthreads();
        u32 weight[kColumns / 2];
        load_row(weight, (kind == 0 ? p.norm_q : p.norm_k) + head_column, kColumns);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarpsN; ++w)
                sum += sums[(tile_row0 + i) * kWarpsN + w];
            const float inverse = rsqrtf(fmaf(sum, 1.f / BN, p.norm_epsilon));
            const u32 position = (u32)min(at.row + i, p.m - 1) % (u32)p.rope_rows;
            const float4* turns = (const float4*)p.rope + (position * BN + head_column) / 2;
#pragma unroll
            for (int j = 0; j < kColumns; j += 2) {
                const float4 turn = turns[j / 2];
                float& first = acc[i / 2][j / 2][i % 2 * 2];
                float& second = acc[i / 2][j / 2][i % 2 * 2 + 1];
                const float a = first * inverse * T::low(weight[j / 2]);
                const float b = second * inverse * T::high(weight[j / 2]);
                first = turn.x * a + turn.y * b;
                second = turn.z * a + turn.w * b;
            }
        }
    }
    store(acc, p, at);
}

// kGeluQuantize: the next layer's inputs, as svdq_quantize_int4 would make them of GELU(y):
// unsigned codes, their scales (a warp's 64 columns are a group), and the product with proj_down,
// to which the blocks of a row each add their part.
SVDQ_DEVICE void gelu_quantize(float (&acc)[MT][NT][4], const Arguments& p, const Position& at,
                               u8* shared) {
    constexpr int kRankChunk = 32;
    const bool exists = at.column < p.n;
    u32 smooth[kColumns / 2] = {};
    load_row(smooth, p.next_smooth + at.column, p.n - at.column);

    u32 pairs[kRows][kColumns / 2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        float values[kColumns], largest = 0.f;
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
            pairs[i][j / 2] = T::pack(saturate<T>(gelu_tanh(element(acc, i, j))),
                                      saturate<T>(gelu_tanh(element(acc, i, j + 1))));
            values[j] =
                smoothed<T, true>(T::low(pairs[i][j / 2]), reciprocal(T::low(smooth[j / 2])));
            values[j + 1] =
                smoothed<T, true>(T::high(pairs[i][j / 2]), reciprocal(T::high(smooth[j / 2])));
            largest = fmaxf(largest, fmaxf(values[j], values[j + 1]));
        }
        largest = quad_max(largest);
        const float inverse = inverse_scale<true>(largest);
        u32 codes[kColumns / 8];
#pragma unroll
        for (int j = 0; j < kColumns; j += 8)
            codes[j / 8] = pack_codes<true>(values + j, inverse);
        if (exists && at.row + i < p.m) {
            *(uint2*)(p.next_qact + ((u64)(at.row + i) * p.n + at.column) / 2) =
                make_uint2(codes[0], codes[1]);
            if (at.lane % 4 == 0)
                p.next_scale[(u64)(at.column / kGroup) * p.m + at.row + i] =
                    inverse > 0.f ? largest / 15.f : 0.f;
        }
    }

    // GELU(y) . proj_down. The outputs of a product are laid out as the left operand of another;
    // fragment step s of lane q then holds columns 16q + 4s .. + 3, and proj_down's rows are
    // fetched in that order. Shared memory holds the block's BN rows of 32 ranks, 64 bytes each,
    // chunk c of row k at c ^ (k / 16 % 4).
    const int row = at.lane % 8 / 2 * kColumns + at.lane % 2 + at.lane / 8 % 2 * 2 + at.warp_n * WN;
    for (int rank0 = 0; rank0 < p.next_rank; rank0 += kRankChunk) {
        __syncthreads();
        for (int i = read_thread_again(); i < BN * 4; i += kThreads) {
            const int k = i / 4, chunk = i % 4, n = at.column / BN * BN + k;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (n < p.n && rank0 + chunk * 8 < p.next_rank)
                v = *(const uint4*)(p.next_proj_down + (u64)n * p.next_rank + rank0 + chunk * 8);
            *(uint4*)(shared + k * 64 + ((chunk ^ k / 16 % 4) << 4)) = v;
        }
        __syncthreads();
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            float sum[kRankChunk / 8][4] = {};
#pragma unroll
            for (int s = 0; s < NT / 2; ++s) {
                const u32 a[4] = {pairs[2 * mt][2 * s], pairs[2 * mt + 1][2 * s],
                                  pairs[2 * mt][2 * s + 1], pairs[2 * mt + 1][2 * s + 1]};
#pragma unroll
                for (int n = 0; n < kRankChunk / 8; n += 2) {
                    const int k = row + 4 * s, chunk = n + at.lane / 16;
                    u32 b[4];
                    load_matrices_transposed(
                        b, shared_address(shared) + k * 64 + ((chunk ^ k / 16 % 4) << 4));
                    mma_16bit<T>(sum[n], a, b[0], b[1]);
                    mma_16bit<T>(sum[n + 1], a, b[2], b[3]);
                }
            }
#pragma unroll
            for (int n = 0; n < kRankChunk / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int m = at.row + 2 * mt + e / 2;
                    const int column = rank0 + n * 8 + at.lane % 4 * 2 + e % 2;
                    if (m < p.m && column < p.next_rank)
                        atomicAdd(p.next_down + (u64)m * p.next_rank + column, sum[n][e]);
                }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, SVDQ_MIN_BLOCKS)
    svdq_gemm_int4(const Arguments p) {
    extern __shared__ __align__(128) u8 shared[];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int g = lane / 4, q = lane % 4;
    const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
    const u32 stage0 = shared_address(shared);

    int m0, n0;
    block_tile(p, m0, n0);
    // Kept for the epilogue, behind the stages.
    const u32 tile = stage0 + kRingBytes;
    if (tid == 0) *(int2*)(shared + kRingBytes) = make_int2(m0, n0);
    const int groups = p.k / kGroup;
    const int iterations = (groups + kGroups - 1) / kGroups;

    // ---- copies into shared memory. A thread copies its chunk of rows kCopyRows apart (in shared
    // memory's order), which are a fixed number of tile rows apart. Eight threads fill a line.
    const int copy_group = tid / 8 % kGroups, copy_chunk = tid % 2;
    const int copy_row = tid / (8 * kGroups) * 4 + tid / 2 % 4;
    const int slot = copy_row * 2 + (copy_chunk ^ swizzle(copy_row));
    const u32 target = copy_group * kGroupBytes + slot * 16;
    const int row_a = m0 + tile_row(copy_row), row_b = n0 + tile_column(copy_row);
    int rows_left = p.m - row_a, columns_left = p.n - row_b;
    const u32 row_bytes = (u32)p.k / 2, first_byte = copy_group * kRowBytes + copy_chunk * 16;
    const u8* from_a = p.qact + (u64)row_bytes * row_a + first_byte;
    const u8* from_b = p.weight + (u64)row_bytes * row_b + first_byte;

    // The same slot of the scales: four of the activation, eight of the weight, or none.
    const bool is_sx = slot < kSlotsSx;
    const int scale0 = is_sx ? m0 + slot * 4 : n0 + (slot - kSlotsSx) * 8;
    int scales_left = (is_sx ? p.m : slot < kSlotsSx + kSlotsSw ? p.n : 0) - scale0;
    const u32 scale_row_bytes = is_sx ? (u32)p.m * 4 : (u32)p.n * 2;
    const u8* from_scale =
        (is_sx ? (const u8*)(p.act_scale + scale0) : (const u8*)(p.weight_scale + scale0)) +
        (u64)scale_row_bytes * copy_group;

    // Copies the next `count` groups to this thread's slots from `to` on; the scales of the stage's
    // other groups become 0.
    auto load_stage = [&](u32 to, int count) {
        const bool held = count == kGroups || copy_group < count;
        if constexpr (!kEven) {  // compared anew in every stage: the results are too many to keep
            renew(rows_left);
            renew(columns_left);
        }
#pragma unroll
        for (int i = 0; i < kCopiesA; ++i)
            if (held && rows_left > tile_row(i * kCopyRows))
                copy_or_zero<16>(to + i * kCopyRows * kRowBytes,
                                 from_a + (u64)row_bytes * tile_row(i * kCopyRows), true);
#pragma unroll
        for (int i = 0; i < kCopiesB; ++i)
            if (held && (kEven || columns_left > tile_column(i * kCopyRows)))
                copy_or_zero<16>(to + kBytesA + i * kCopyRows * kRowBytes,
                                 from_b + (u64)row_bytes * tile_column(i * kCopyRows), true);
        to += kBytesA + kBytesB;
        if ((kEven || !is_sx) && scales_left > 0) copy_or_zero<16>(to, from_scale, held);
        if constexpr (!kEven) {  // a row of the activation's scales may start anywhere
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (is_sx && scales_left > i) copy_or_zero<4>(to + i * 4, from_scale + i * 4, held);
        }
        from_a += count * kRowBytes;
        from_b += count * kRowBytes;
        from_scale += (u64)scale_row_bytes * (u32)count;
    };

    // If the groups don't fill the stages, the first stage is the short one: the loop stays
    // regular.
    load_stage(stage0 + target, groups - (iterations - 1) * kGroups);
    copy_commit();
#pragma unroll
    for (int s = 1; s < kStages - 1; ++s) {
        if (s < iterations) load_stage(stage0 + target + s * kStageBytes, kGroups);
        copy_commit();
    }

    // ---- the low-rank branch, while the first stages arrive
    float acc[MT][NT][4] = {};
    if (p.rank) project_up(acc, p, m0 + warp_m * WM, n0 + warp_n * WN);

    // ---- the main loop
    const int fragment_row_a = warp_m * WM + lane % 16;
    const int fragment_row_b = warp_n * WN + lane / 16 * 8 + lane % 8;
    const u32 fragment_a =
        fragment_row_a * kRowBytes + ((lane / 16 ^ swizzle(fragment_row_a)) << 4);
    const u32 fragment_b =
        kBytesA + fragment_row_b * kRowBytes + ((lane / 8 % 2 ^ swizzle(fragment_row_b)) << 4);
    const u32 scales_x = kBytesA + kBytesB + (warp_m * WM + g * kRows) * 4;
    const u32 scales_w = kBytesA + kBytesB + kBytesSx + (warp_n * WN + q * kColumns) * 2;

    // This thread's activation scales of the next group, and the way from there to all else.
    u32 read = stage0 + kRingBytes + scales_x;
    const u32 to_a = fragment_a - scales_x, to_b = fragment_b - scales_x;
    const u32 to_w = scales_w - scales_x, to_target = target - scales_x;

    renew(scales_left);  // so that what is found of it need not outlast the low-rank branch
#pragma unroll 1
    for (int left = iterations; left; --left) {
        copy_wait<kStages - 2>();
        __syncthreads();
        // The stage before, used last time, is filled again.
        if (left >= kStages) load_stage(read + to_target - kStageBytes, kGroups);
        if (read >= stage0 + kRingBytes) read -= kRingBytes;
        copy_commit();

        // Not unrolled: the compiler would rename the accumulators from group to group, and then
        // move them all back.
#pragma unroll 1
        for (int group = 0; group < kGroups; ++group) {
            float sx[kRows];
            if constexpr (kRows >= 4) {
#pragma unroll
                for (int i = 0; i < kRows; i += 4) {
                    uint4 v = load_shared16(read + i * 4);
                    sx[i] = as_float(v.x), sx[i + 1] = as_float(v.y);
                    sx[i + 2] = as_float(v.z), sx[i + 3] = as_float(v.w);
                }
            } else {
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                    sx[i] = as_float(load_shared4(read + i * 4));
            }
            u32 a[MT][4];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(a[mt], read + to_a + mt * 16 * kRowBytes);
            // The loads above stay above, those below come later: with these at hand, products are
            // used up as they come, and the compiler does not run out of registers.
            __syncwarp();
            u32 sw[kColumns / 2];
#pragma unroll
            for (int j = 0; j < kColumns / 2; j += 4) {
                uint4 v = load_shared16(read + to_w + j * 4);
                sw[j] = v.x, sw[j + 1] = v.y, sw[j + 2] = v.z, sw[j + 3] = v.w;
            }
#pragma unroll
            for (int pair = 0; pair < NT / 2; ++pair) {
                u32 b[4];
                load_matrices(b, read + to_b + pair * 16 * kRowBytes);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int nt = 2 * pair + half;
                    const float w0 = T::low(sw[nt]), w1 = T::high(sw[nt]);
                    const float o0 = -kMagicFloat * w0, o1 = -kMagicFloat * w1;
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
                        u32 d[4];
                        mma_4bit<kUnsigned>(d, a[mt], b[2 * half], b[2 * half + 1], kMagic);
                        float (&c)[4] = acc[mt][nt];
                        c[0] = fmaf(fmaf(as_float(d[0]), w0, o0), sx[2 * mt], c[0]);
                        c[1] = fmaf(fmaf(as_float(d[1]), w1, o1), sx[2 * mt], c[1]);
                        c[2] = fmaf(fmaf(as_float(d[2]), w0, o0), sx[2 * mt + 1], c[2]);
                        c[3] = fmaf(fmaf(as_float(d[3]), w1, o1), sx[2 * mt + 1], c[3]);
                    }
                }
            }
            read += kGroupBytes;
        }
    }

    // The epilogue may use shared memory: no copy may land there any more, and no warp still read
    // it.
    copy_wait<0>();
    __syncthreads();
    const Position at(tile);
    add_bias(acc, p, at);
    if constexpr (kEpilogue == kStore) store(acc, p, at);
    if constexpr (kEpilogue == kNormRope) norm_rope(acc, p, at, (float*)shared);
    if constexpr (kEpilogue == kGeluQuantize) gelu_quantize(acc, p, at, shared);
}
