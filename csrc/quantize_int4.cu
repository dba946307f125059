// From x (M, K): 4-bit codes of x / smooth, their scales, and x . proj_down, reading x once.
//
// The first half of an SVDQuant W4A4 layer. One build of this file is one kernel, shaped by the
// macros below; svdq_core/kernels/plan.py says which builds there are and when each runs.
//
// A block takes a few rows and all columns, of which each of its W warps takes every W-th group of
// 64. So x . proj_down is added up in the block, at its end, and until then no warp waits for
// another. All of proj_down passes by each block: few and high ones spare bandwidth.
//
//                group 0   group 1          group W
//              +---------+---------+- . . +---------+- . .
//       tile 0 |         |         |      |         |         a tile: 16 rows, or the last one 8,
//              +---------+---------+- . . +---------+- . .    so that blocks' shares are even
//       tile 1 |         |         |      |         |
//              +---------+---------+- . . +---------+- . .
//                warp 0    warp 1           warp 0
//
// Where rows are not a multiple of eight for each block, the first blocks have eight more, and all
// others wait for them at the end. With SVDQ_SHARES these last rows lie behind all others'; a block
// multiplies them, but quantizes only some of their groups, and the rest is dealt out, eight rows
// of a group at a time (a unit), to the warps of blocks that have no such rows.
//
// The same 16 bytes of x that a lane loads serve it as what is quantized and as its part of the
// matrix product's right operand (the product is transposed, proj_down^T . x^T, because that
// operand's registers are a row's own), so x never leaves the registers. For that the product's
// columns are dealt anew: a product over 16 columns wants four from each lane of a quad (lane q =
// lane % 4), and a lane loads
//
//     chunk 0: columns 8q .. 8q + 7        chunk 1: columns 32 + 8q .. 32 + 8q + 7
//
// of rows g and g + 8 (g = lane / 4), so product s takes columns 32 (s / 2) + 8q + 4 (s % 2) .. +
// 3, and the rows of proj_down are fetched from shared memory in the same order: row j of a
// fragment's half h is 32 (s / 2) + 8 (j / 2) + 4 (s % 2) + 2h + j % 2.
//
// Shared memory of a warp:   slab | slab | x | 1 / smooth, float32 | (image) chunks' scales
//
//     slab: the 64 rows of proj_down of a group, copied two groups ahead. At the end the slabs'
//           place has the warp's sums.
//        x: STAGES times 2 KB, the next tiles: chunk i of lane l at 512 i + 16 l. A lane copies
//           what it will use itself, so that nobody waits for anybody.
//
// The rows of a slab that one ldmatrix reads differ in row / 8 % 4 and row % 2, which with the
// swizzle below puts them into eight different 16-byte columns:
//
//     stride 64 bytes (up to 32 ranks):  chunk c at c ^ (row / 8 % 4); row % 2 picks the line's
//     half stride 128 bytes (64 ranks):       chunk c at c ^ (row / 8 % 4 + 4 (row % 2))
//
// With SVDQ_PROLOGUE = 3 and 4 what is quantized is rotated (rotation.cuh): product s has the
// columns that differ in bits 0, 1, 3 and 4, and a lane's four of them differ in bits 0 and 1.
//
// Hopper multiplies bytes, and x . proj_down in 16 bits. SVDQ_OUTPUT says how they are written:
//
//   image    as csrc/gemm_hopper.cu reads it: magnitude and sign, swizzled; scales as fp16 relative
//            to the largest of their chunk of eight groups, which is one warp's
//   bytes    for csrc/gemm_grid.cu: int8 codes in the order of x, scales in float32
#include "codes.cuh"
#include "device.cuh"
#include "rotation.cuh"

#ifndef SVDQ_UNSIGNED  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_UNSIGNED 0
#    define SVDQ_RANK_TILES 4
#    define SVDQ_PROLOGUE 0
#    define SVDQ_STAGES 4
#    define SVDQ_WARPS 12
#    define SVDQ_TILES 3
#    define SVDQ_OUTPUT 0
#    define SVDQ_SHARES 0
#endif

namespace {

constexpr bool kUnsigned = SVDQ_UNSIGNED;
constexpr int RT = SVDQ_RANK_TILES;  // products of 8 ranks each; 0 without a low-rank branch

enum Form { kNibbles = 0, kImage = 1, kBytes = 2 };
constexpr Form kForm = (Form)SVDQ_OUTPUT;
constexpr bool kShares = SVDQ_SHARES;
static_assert(!kShares || kForm != kImage, "scales of an image's chunk are one warp's");
enum Prologue { kNone = 0, kGelu = 1, kModulate = 2, kRotate = 3, kGeluRotate = 4 };
constexpr Prologue kPrologue = (Prologue)SVDQ_PROLOGUE;
constexpr bool kOfGelu = kPrologue == kGelu || kPrologue == kGeluRotate;
constexpr bool kRotates = kPrologue == kRotate || kPrologue == kGeluRotate;

// Bytes of the image hold a magnitude and a sign: the magnitude is worked out here, the sign is
// x's, or what the rotation made of it.
constexpr bool kMagnitude = kForm == kImage && !kUnsigned;
constexpr bool kSignOfX = kMagnitude && !kRotates;

constexpr int kRows = 16, kStages = SVDQ_STAGES, kMostTiles = SVDQ_TILES;
constexpr int kChunk = 8;  // groups whose scales are relative to one another's (image)
constexpr int kTiles = RT ? RT : 1, kPairs = RT ? RT / 2 : 1;
constexpr int kStride = RT > 4 ? 128 : 64;  // bytes of a slab's row
constexpr u32 kSlab = RT ? kGroup * kStride : 0;
constexpr u32 kTileX = kRows * kGroup * 2;
constexpr u32 kInverse = 2 * kSlab + kStages * kTileX;  // where a warp's 1 / smooth begins
constexpr u32 kScales = kInverse + kGroup * 4;
constexpr u32 kTileScales = kForm == kImage ? kRows * kChunk * 4 : 0;
constexpr u32 kWarpBytes = kScales + kMostTiles * kTileScales;
static_assert(kMostTiles * RT * 512 <= 2 * kSlab, "sums fit where slabs were");

// A lane's part of x . proj_down: of 16 t + g (element 0, 1) and 16 t + g + 8 (2, 3), rows 8 h + 2
// q (0, 2) and + 1 (1, 3), where its q and g are a fragment's, t the first index and h the second.
using Sums = float[kPairs][2][4];
// And of the group's 64 rows of proj_down: of products s and ranks 16 t to 16 t + 15.
using Fragments = u32[4][kPairs][4];

struct Arguments {
    const u16* x;          // (M, K), or its first columns
    const u16* smooth;     // (K,)
    const u16* proj_down;  // (K, rank)
    u8* qact;              // (M, K / 2); bytes: (M, K); image: (K / 128, padded M, 128)
    void* act_scale;       // (K / 64, padded M) float32; image: (K / 128, padded M, 2) pairs
    // (M, rank) float32; bytes: (M, rank to a multiple of 64), image: (rank / 64, padded M, 64),
    // 16-bit
    void* down;
    int m, k, rank;
    int eights, longer;  // of a block, eight rows each, and how many first blocks have one more
    int own_groups;      // of that one, which a block quantizes itself; kShares
    // kModulate: x (1 + scale) + shift
    const u16* modulation_scale;  // (M / modulation_rows, K)
    const u16* modulation_shift;
    int modulation_rows;
    int padded_m;        // M for nibbles
    float* chunk_scale;  // (K / 512, padded M); image only
    float* down_scale;   // (rank / 64, padded M); not with nibbles, fp16 only
    // kOfGelu: of the other columns GELU is taken
    const u16* y;  // their first row
    int x_groups, y_stride;
};

// Where chunk `chunk` of row `row` of a slab lies.
SVDQ_DEVICE u32 slab_offset(u32 row, u32 chunk) {
    const u32 swizzle = row / 8 % 4 + (kStride == 128 ? row % 2 * 4 : 0);
    return row * kStride + ((chunk ^ swizzle) << 4);
}

// A lane's share of a group: two rows, 16 columns each as 8 pairs.
struct Fragment {
    u32 pair[2][8];

    SVDQ_DEVICE explicit Fragment(u32 shared) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = load_shared16(shared + 512 * i);
            u32* to = &pair[i / 2][i % 2 * 4];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
};

SVDQ_DEVICE void apply_gelu(Fragment& x) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        u32& pair = x.pair[i / 8][i % 8];
        pair = T::pack(gelu_tanh(T::low(pair)), gelu_tanh(T::high(pair)));
    }
}

SVDQ_DEVICE void apply_modulation(Fragment& x, const Arguments& p, u32 row0, u32 row1, u32 column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u64 at = (u64)((h ? row1 : row0) / (u32)p.modulation_rows) * p.k + column;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4 s = *(const uint4*)(p.modulation_scale + at + 32 * i);
            const uint4 t = *(const uint4*)(p.modulation_shift + at + 32 * i);
            const u32 scale[4] = {s.x, s.y, s.z, s.w}, shift[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32& pair = x.pair[h][4 * i + j];
                pair = T::pack(
                    saturate<T>(fmaf(T::low(pair), 1.f + T::low(scale[j]), T::low(shift[j]))),
                    saturate<T>(fmaf(T::high(pair), 1.f + T::high(scale[j]), T::high(shift[j]))));
            }
        }
    }
}

// 1 / smooth; where the sign is x's, the weight's image has smooth's.
SVDQ_DEVICE float inverse_factor(float smooth) {
    return reciprocal(kSignOfX ? fabsf(smooth) : smooth);
}

using Values = float[16];  // of a row, in the order of its pairs

// `inverse_smooth` is shared memory with the group's 64 floats from this lane's first column on.
SVDQ_DEVICE void smooth_rows(Values (&values)[2], const Fragment& x, u32 inverse_smooth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 s = load_shared16(inverse_smooth + i / 2 * 128 + i % 2 * 16);
        const u32 inverse[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 first = x.pair[h][2 * i], second = x.pair[h][2 * i + 1];
            const float four[4] = {T::low(first), T::high(first), T::low(second), T::high(second)};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                values[h][4 * i + j] = kSignOfX
                                           ? fabsf(four[j]) * as_float(inverse[j])
                                           : smoothed<T, kUnsigned>(four[j], as_float(inverse[j]));
        }
    }
}

// The group's smoothed values in 16 bits, rotated, over 8; false if a row's are not finite.
SVDQ_DEVICE bool rotate(Values (&values)[2], const Signs& signs, bool clamp) {
    Pairs pair;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float low = values[h][2 * i], high = values[h][2 * i + 1];
            pair[h][i] = clamp ? T::pack(saturate<T>(low), saturate<T>(high)) : T::pack(low, high);
        }
    bool finite = true;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float half[2][4][2];
        finite &= rotate_half(half, pair, signs, n);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            values[i / 8][i / 2 % 4 * 4 + 2 * n + i % 2] = half[i / 8][i / 2 % 4][i % 2];
    }
    return finite;
}

// Both rows' values of a group.
SVDQ_DEVICE void values_of(Values (&values)[2], const Fragment& x, u32 inverse_smooth,
                           const Signs& signs) {
    smooth_rows(values, x, inverse_smooth);
    if constexpr (kRotates) {
        if (__all_sync(0xFFFFFFFFu, rotate(values, signs, false))) return;
        smooth_rows(values, x, inverse_smooth);
        rotate(values, signs, true);
    }
}

// Quantizes one row of a group. `codes` are 16 nibbles or 16 bytes. Every lane of the quad returns
// the group's scale.
SVDQ_DEVICE float quantize_row(Values& values, const u32 (&pair)[8], u32 (&codes)[4]) {
    float part[4];  // four chains of maxima, not one long one
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float value = kUnsigned || kSignOfX ? values[i] : fabsf(values[i]);
        part[i % 4] = fmaxf(i < 4 ? 0.f : part[i % 4], value);
    }
    float largest = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    largest = quad_max(largest);
    if (!kRotates && largest > kFloatMax) {  // x / smooth overflowed
        largest = kFloatMax;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            values[i] = fminf(fmaxf(values[i], -kFloatMax), kFloatMax);
    }
    const float inverse = inverse_scale<kUnsigned>(largest);
    if constexpr (kForm != kNibbles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* four = values + 4 * i;
            if constexpr (kMagnitude) {
                const float magnitudes[4] = {fabsf(four[0]), fabsf(four[1]), fabsf(four[2]),
                                             fabsf(four[3])};
                codes[i] = pack_bytes<kUnsigned>(magnitudes, inverse) |
                           (kSignOfX ? sign_bytes(pair[2 * i], pair[2 * i + 1]) : sign_bytes(four));
            } else {
                codes[i] = pack_bytes<kUnsigned>(four, inverse);
            }
        }
    } else {
        codes[0] = pack_codes<kUnsigned>(values, inverse);
        codes[1] = pack_codes<kUnsigned>(values + 8, inverse);
    }
    constexpr float kUnit = kUnsigned ? 1.f / 15.f : kRotates ? 8.f / 7.f : 1.f / 7.f;
    return inverse > 0.f ? fminf(largest * kUnit, kFloatMax) : 0.f;
}

// What a warp needs to know to write what it makes.
struct Output {
    const Arguments& p;
    u32 lane, g, q;

    SVDQ_DEVICE Output(const Arguments& p, u32 lane) : p(p), lane(lane), g(lane / 4), q(lane % 4) {}

    // Row h of this lane's two in a tile, of the eight from row0 on. `scales` is shared memory for
    // the tile's scales of a chunk (image), (16 rows, 8 groups).
    SVDQ_DEVICE void codes(u32 row0, u32 group, u32 h, const u32 (&codes)[4], float scale,
                           u32 scales) const {
        const u32 row = row0 + g;
        const bool exists = row < (u32)p.m;
        if (kForm == kImage) {
            // 16 bytes of a lane are the quad's q-th of the group: see hopper.py for the order.
            const u32 chunk = (group % 2 * 4 + q) ^ g;
            u8* to = p.qact + ((u64)(group / 2) * p.padded_m + row) * 128 + chunk * 16;
            if (exists) *(uint4*)to = make_uint4(codes[0], codes[1], codes[2], codes[3]);
            if (q == 0)
                store_shared4(scales + ((g + 8 * h) * kChunk + group % kChunk) * 4, as_bits(scale));
        } else if (exists) {
            const u32 at = row * p.k + group * kGroup;  // fewer than 2^31
            if (kForm == kBytes) {
                u8* to = p.qact + (at + q * 8);
                *(uint2*)to = make_uint2(codes[0], codes[1]);
                *(uint2*)(to + 32) = make_uint2(codes[2], codes[3]);
            } else {
                u8* to = p.qact + (at / 2 + q * 4);
                *(u32*)to = codes[0];
                *(u32*)(to + 16) = codes[1];
            }
            if (q == 0) ((float*)p.act_scale)[group * p.padded_m + row] = scale;
        }
    }

    // Image: the scales of a chunk of `count` groups, relative to each row's largest.
    SVDQ_DEVICE void chunk(const u32 (&first)[2], u32 rows, u32 chunk, u32 count,
                           u32 scales) const {
        __syncwarp();
        const u32 row = (lane < 16 ? first[0] : first[1]) + lane / 2 % 8, half = lane % 2 * 4;
        const uint4 v = load_shared16(scales + lane * 16);
        float s[4] = {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)}, largest = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (half + i >= count) s[i] = 0.f;
            largest = fmaxf(largest, s[i]);
        }
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        const float inverse = largest > 0.f ? reciprocal(largest) : 0.f;
        u32 twice[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float relative = s[i] * inverse * 512.f;
            twice[i] = Fp16::pack(relative, relative);
        }
        __syncwarp();
        if (row >= (u32)p.m || lane / 2 >= rows) return;
        u32* to = (u32*)p.act_scale + ((u64)(chunk * 4 + half / 2) * p.padded_m + row) * 2;
        if (half < count) *(uint2*)to = make_uint2(twice[0], twice[1]);
        if (half + 2 < count) *(uint2*)(to + (u64)p.padded_m * 2) = make_uint2(twice[2], twice[3]);
        if (half == 0) p.chunk_scale[(u64)chunk * p.padded_m + row] = largest * kChunkUnit;
    }
    // Room for sums near the largest float32: gemm_hopper.cu takes it back by the column's scale.
    static constexpr float kChunkUnit = T::kIsBf16 ? 1.f / 1048576.f : 1.f;

    // The finished sums of 16 Pairs ranks from rank0 on, of the eight rows from row0 on.
    template <u32 Pairs>
    SVDQ_DEVICE void down(const float (&sum)[Pairs][4], u32 row0, u32 rank0) const {
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
            const u32 row = row0 + 2 * q + e;
            float scale = 1.f;
            if (kForm != kNibbles &&
                !T::kIsBf16) {  // to fp16's range, by a power of two for each row
                float largest = 0.f;
#pragma unroll
                for (u32 t = 0; t < 2 * Pairs; ++t)
                    largest = fmaxf(largest, fabsf(sum[t / 2][t % 2 * 2 + e]));
                largest = fmaxf(largest, shuffle_xor(largest, 4));
                largest = fmaxf(largest, shuffle_xor(largest, 8));
                largest = fmaxf(largest, shuffle_xor(largest, 16));
                scale = down_power(largest);
                if (g == 0 && row < (u32)p.m)
                    p.down_scale[(u64)(rank0 / 64) * p.padded_m + row] = 1.f / scale;
            }
            if (row >= (u32)p.m) continue;
#pragma unroll
            for (u32 t = 0; t < 2 * Pairs; ++t) {
                const u32 rank = rank0 + t * 8 + g;
                const float value = sum[t / 2][t % 2 * 2 + e];
                if (kForm != kNibbles) {
                    const u64 width = (p.rank + 63) / 64 * 64;
                    const u64 at = kForm == kBytes ? row * width + rank
                                                   : ((u64)(rank / 64) * p.padded_m + row) * 64 +
                                                         ((rank % 64 / 8) ^ (row % 8)) * 8 + g;
                    ((u16*)p.down)[at] = (u16)pack_down<T>(value * scale, 0.f);
                } else if (rank < (u32)p.rank) {
                    ((float*)p.down)[(u64)row * p.rank + rank] =
                        fminf(fmaxf(value, -kFloatMax), kFloatMax);
                }
            }
        }
    }
};

// Brings weights to the second-level cache, a line for each of all blocks' threads.
SVDQ_DEVICE void prefetch(const void* from, u32 bytes) {
    for (u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * 128; at < bytes;
         at += gridDim.x * blockDim.x * 128)
        prefetch_line((const u8*)from + at);
}

// Of a warp: what blocks with eight rows more leave to the others, of those rows, eight at a time,
// the groups from p.own_groups on.
struct Units {
    u32 row, group = 0;
    const u32 end, groups, share;  // rows end there; groups of a row, and how many are dealt out
    u32 step_rows = 0, step_groups = 0;

    SVDQ_DEVICE Units(const Arguments& p, u32 warp, u32 warps)
        : end((gridDim.x * p.eights + p.longer) * 8),
          groups(p.k / kGroup),
          share(groups - p.own_groups) {
        row = end;
        if (!kShares || blockIdx.x < (u32)p.longer || blockIdx.z || share == 0) return;
        const u32 others = gridDim.x - p.longer, step = others * warps;
        const u32 first = others * warp + blockIdx.x - p.longer;
        step_rows = step / share * 8;
        step_groups = step % share;
        row = (gridDim.x * p.eights + first / share) * 8;
        group = p.own_groups + first % share;
    }
    SVDQ_DEVICE bool there() const {
        return kShares && row < end;
    }
    SVDQ_DEVICE void advance() {
        row += step_rows;
        group += step_groups;
        if (group >= groups) {
            group -= share;
            row += 8;
        }
    }
};

// The group after `group` of a warp's. An image's chunks are a warp's as a whole.
SVDQ_DEVICE u32 group_after(u32 group, u32 warps) {
    if (kForm != kImage) return group + warps;
    return group % kChunk == kChunk - 1 ? group + 1 + (warps - 1) * kChunk : group + 1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SVDQ_WARPS * 32, 1)
    svdq_quantize_int4(const Arguments p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 g = lane / 4, q = lane % 4;
    const u32 groups = p.k / kGroup, rank0 = blockIdx.z * RT * 8;
    const bool quantizes = blockIdx.z == 0;  // the blocks of further ranks only multiply

    const u32 block = blockIdx.x, longer = p.longer, base = p.eights;
    const u32 eights = base + (block < longer), tiles = (eights + 1) / 2;
    const u32 first = eights == 0 ? groups : kForm == kImage ? warp * kChunk : warp;
    const u32 last_row = p.m - 1;
    const u32 row0 = (block * base + (kShares ? 0 : min(block, longer))) * 8;
    const u32 last_rows = (gridDim.x * base + block) * 8;
    auto row_of = [&](u32 eight) {
        return !kShares || eight < base ? row0 + eight * 8 : last_rows;
    };

    const u32 mine = shared_address(memory) + warp * kWarpBytes;
    const u32 ring = mine + 2 * kSlab + lane * 16;
    const Output out(p, lane);

    Units units(p, warp, warps);
    Units next_units = units;
    // The next tile of x: of a group all tiles, then of the next group; then of units.
    u32 next_group = first, next_tile = 0, write = ring, read = ring;
    auto copy_x = [&] {
        const bool of_tile = next_group < groups;
        if (of_tile || next_units.there()) {
            const u32 group = of_tile ? next_group : next_units.group;
            const u16* from = p.x;
            u32 stride = p.k, column = group * kGroup + 8 * q;
            if (kOfGelu) {
                const u32 columns = p.x_groups * kGroup;
                const bool of_y = group >= (u32)p.x_groups;
                from = of_y ? p.y : p.x;
                stride = of_y ? p.y_stride : columns;
                column -= of_y ? columns : 0;
            }
            const u32 eight = 2 * next_tile;
            const u32 first_row = of_tile ? row_of(eight) : next_units.row;
            const u16* x0 = from + (min(first_row + g, last_row) * stride + column);
            const u16* x1 = from + (min(row_of(eight + 1) + g, last_row) * stride + column);
#pragma unroll
            for (int c = 0; c < 4; ++c)
                copy_or_zero<16>(write + 512 * c, (c < 2 ? x0 : x1) + c % 2 * 32,
                                 c < 2 || (of_tile && eight + 1 < eights));
            write = write == ring + (kStages - 1) * kTileX ? ring : write + kTileX;
            if (!of_tile) {
                next_units.advance();
            } else if (++next_tile == tiles) {
                next_tile = 0;
                next_group = group_after(next_group, warps);
            }
        }
        copy_commit();
    };
    auto next_x = [&] {
        const Fragment x(read);
        read = read == ring + (kStages - 1) * kTileX ? ring : read + kTileX;
        copy_x();  // to where this tile was
        return x;
    };
    constexpr u32 kRowsAtOnce = 32 / kTiles;  // of a slab, by a warp
    const u32 slab_row = lane / kTiles, slab_chunk = lane % kTiles;
    auto copy_slab = [&](u32 slab, u32 group) {
        if constexpr (RT > 0) {
            if (group < groups) {
                const bool exists = rank0 + slab_chunk * 8 < (u32)p.rank;
                const u16* from = p.proj_down + (u64)(group * kGroup + slab_row) * p.rank + rank0 +
                                  slab_chunk * 8;
#pragma unroll
                for (u32 row = 0; row < kGroup; row += kRowsAtOnce) {
                    copy_or_zero<16>(slab + slab_offset(row + slab_row, slab_chunk), from, exists);
                    from += kRowsAtOnce * p.rank;
                }
            }
            copy_commit();
        }
    };
    // Two columns' smoothing factors, of a group or else the warp's next unit.
    auto load_smooth = [&](u32 group) {
        if (group >= groups && units.there()) group = units.group;
        return group < groups ? ((const u32*)p.smooth)[group * (kGroup / 2) + lane] : 0;
    };
    auto store_inverse = [&](u32 smooth) {
        store_shared8(mine + kInverse + 8 * lane, as_bits(inverse_factor(T::low(smooth))),
                      as_bits(inverse_factor(T::high(smooth))));
    };

    if (RT > 0 && quantizes) prefetch(p.proj_down, p.k * p.rank * 2);
    if (quantizes) prefetch(p.smooth, p.k * 2);
    wait_for_kernel_before();
    let_next_kernel_start();

    u32 turn = 0;  // which of the two slabs, in bytes
    const u32 second = group_after(first, warps), third = group_after(second, warps);
    u32 smooth = load_smooth(first);  // behind the copies it would wait for all of them
    __syncwarp();
    copy_x();  // first, since it comes from farthest
    copy_slab(mine, first);
    copy_slab(mine + kSlab, second);
#pragma unroll
    for (int i = 1; i < kStages; ++i)
        copy_x();

    const Signs signs(g, q);
    Sums sum[kMostTiles] = {};
    // Fragment rows of products s: 32 (s / 2) + 4 (s % 2) rows on from these, which leaves the
    // swizzle as it is; chunks 2 t on flip bits of the chunk's number.
    const u32 fragment = slab_offset(lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2, lane / 8 % 2);

    // Those of a group, for all of its tiles, where they stay in registers.
    constexpr bool kKeepsFragments = RT <= (kRotates ? 2 : 4);
    Fragments fragments;
    auto load_fragment = [&](u32(&a)[4], int s, int t) {
        load_matrices_transposed(
            a, ((mine + turn + fragment) ^ t << 5) + (s / 2 * 32 + s % 2 * 4) * kStride);
    };

    auto prepare = [&](Fragment& x, const u32(&rows)[2], u32 group) {
        if (kOfGelu && group >= (u32)p.x_groups) apply_gelu(x);
        if (kPrologue == kModulate)
            apply_modulation(x, p, min(rows[0] + g, last_row), min(rows[1] + g, last_row),
                             group * kGroup + 8 * q);
    };
    auto quantize = [&](const Fragment& x, const u32(&rows)[2], u32 group, u32 scales,
                        bool second) {
        Values values[2];
        values_of(values, x, mine + kInverse + 32 * q, signs);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            if (h == 1 && !second) break;
            u32 codes[4];
            const float scale = quantize_row(values[h], x.pair[h], codes);
            out.codes(rows[h], group, h, codes, scale, scales);
        }
    };
    auto take_tile = [&](Sums& sum, u32 tile, u32 group) {
        Fragment x = next_x();
        const u32 rows[2] = {row_of(2 * tile), row_of(2 * tile + 1)};
        prepare(x, rows, group);
        if constexpr (RT > 0) {
#pragma unroll
            for (int s = 0; s < 4; ++s) {
#pragma unroll
                for (int t = 0; t < RT / 2; ++t) {
                    u32 loaded[4];
                    if (!kKeepsFragments) load_fragment(loaded, s, t);
                    const u32(&a)[4] = kKeepsFragments ? fragments[s][t] : loaded;
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        mma_16bit<T>(sum[t][h], a, x.pair[h][2 * s], x.pair[h][2 * s + 1]);
                }
            }
        }
        const u32 mine_to_quantize = kShares && group >= (u32)p.own_groups ? base : eights;
        if (quantizes && 2 * tile < mine_to_quantize) {
            const u32 scales = mine + kScales + tile * kTileScales;
            const bool second = 2 * tile + 1 < mine_to_quantize;
            quantize(x, rows, group, scales, second);
            if (kForm == kImage && (group % kChunk == kChunk - 1 || group == groups - 1))
                out.chunk(rows, second ? 16 : 8, group / kChunk, group % kChunk + 1, scales);
        }
    };

#pragma unroll 1
    for (u32 group = first; group < groups;) {
        const u32 next = group_after(group, warps);
        // The first two slabs come before the second tile, others before as many tiles as a group
        // has and one more slab.
        if (RT == 0 || group < third) {
            copy_wait<kStages - 1>();
        } else if (tiles == 1) {
            copy_wait<(kStages - 1 < 2 ? kStages - 1 : 2)>();
        } else {
            copy_wait<(kStages - 1 < 3 ? kStages - 1 : 3)>();
        }
        store_inverse(smooth);
        smooth = load_smooth(next);
        __syncwarp();
        if constexpr (RT > 0 && kKeepsFragments) {
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int t = 0; t < RT / 2; ++t)
                    load_fragment(fragments[s][t], s, t);
        }
#pragma unroll
        for (u32 t = 0; t < kMostTiles; ++t)
            if (t < tiles) {
                if (t) copy_wait<kStages - 1>();
                take_tile(sum[t], t, group);
            }
        __syncwarp();  // everyone is done with the slab and the factors
        copy_slab(mine + turn, group_after(next, warps));
        turn ^= kSlab;
        group = next;
    }

    if constexpr (kShares) {
#pragma unroll 1
        while (units.there()) {
            copy_wait<kStages - 1>();
            store_inverse(smooth);
            const u32 group = units.group, rows[2] = {units.row, units.row};
            units.advance();
            smooth = load_smooth(groups);
            __syncwarp();
            Fragment x = next_x();
            prepare(x, rows, group);
            quantize(x, rows, group, 0, false);
            __syncwarp();
        }
    }

    // ---- x . proj_down: the warps' sums, in their order; eight rows, or some of their ranks, for
    // each warp
    if constexpr (RT > 0) {
#pragma unroll
        for (u32 t = 0; t < kMostTiles; ++t)
            if (t < tiles)
#pragma unroll
                for (int n = 0; n < RT; ++n) {
                    const float* v = sum[t][n / 2][n % 2];
                    store_shared16(mine + ((t * RT + n) * 32 + lane) * 16, as_bits(v[0]),
                                   as_bits(v[1]), as_bits(v[2]), as_bits(v[3]));
                }
        __syncthreads();
        constexpr bool kScaled = kForm != kNibbles && !T::kIsBf16;  // a row by all of its ranks
        constexpr u32 kParts = kScaled ? 1 : kPairs, kPart = kPairs / kParts;
        for (u32 i = warp; i < eights * kParts; i += warps) {
            const u32 eight = i / kParts, pair0 = i % kParts * kPart;
            const u32 from = shared_address(memory) +
                             (((eight / 2 * kPairs + pair0) * 2 + eight % 2) * 32 + lane) * 16;
            float total[kPart][4] = {};
#pragma unroll 8
            for (u32 w = 0; w < warps; ++w)
#pragma unroll
                for (u32 n = 0; n < kPart; ++n) {
                    const uint4 v = load_shared16(from + w * kWarpBytes + n * 1024);
                    total[n][0] += as_float(v.x), total[n][1] += as_float(v.y);
                    total[n][2] += as_float(v.z), total[n][3] += as_float(v.w);
                }
            out.down(total, row_of(eight), rank0 + pair0 * 16);
        }
    }
}
