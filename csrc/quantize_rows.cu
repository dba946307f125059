// int8 codes of x (M, K) with one scale a row, and x . proj_down: on sm_90a only
//
//     r = x / smooth_factor                                                 SVDQ_ROTATE = 0
//     r = rotation, in groups of 64, of x * inverse                         SVDQ_ROTATE = 1
//         (both roundings to x's type)
//     the same of [x, GELU(y)], which is rounded, too                       SVDQ_GELU = 1
//     qact[m, k] = round(r[m, k] / act_scale[m]),   act_scale[m] = largest |r| of the row / 127
//
// The first half of a layer of 8 bits; gemm_rows.cu is the second. Rotated, it is that of a
// 4-bit layer evaluated in 8 bits, whose low-rank branch is in its weight.
//
// A row's scale is known at its end, when most of the row would have left the chip. So a cluster of
// blocks has 16 whole rows at a time, each block always the same part of the columns:
//
//               block 0                      block 1
//           +-------+-------+-------+- . . +-------+- . .
//   16 rows | group | group | group |      | group |       a group: 64 columns, that is
//           +-------+-------+-------+- . . +-------+- . .  128 bytes of each row
//             warp 0  warp 1  warp 2         warp 0
//
// and runs over the rows, 16 by 16. (Of two blocks each has 16 rows of its own first, while there
// are rows for all blocks of the card; only what is left is shared.) Groups come through a ring in
// shared memory, some of them in one copy (a box), as far ahead as it holds. Every warp of a block
// has its part:
//
//   computing   takes groups as they arrive, puts r in x's place (unless it is not rotated), and
//               notes the largest of each row; encodes its groups of the 16 rows before, for which
//               the factor is there by then
//   branch      16 ranks each: x . proj_down over half of the block's columns, of which proj_down
//               stays in shared memory; each block adds up 16 / cluster of the rows
//   telling     tells the blocks of the cluster the block's largest, and its own warps the factors
//   copying     fills the ring, box by box
//
// Shared memory:
//   ring, 2 KB a group | proj_down, swizzled | 1 / smooth_factor (rotated: in 16 bits, and where a
//   block may have rows of its own of all columns) | and twice, in turn:
//   warps' largest, blocks' largest, factors, branch's sums of each block | barriers
//
// A lane (g = lane / 4, q = lane % 4) has columns 16 q + 0 .. 15 of rows g and g + 8: two 16-byte
// chunks of each, which the copies' swizzle puts where a quarter of a warp meets no bank twice.
//
// Who may write where again, since blocks run ahead of each other: a block tells its largest of
// rows t + 2 after it was told those of t + 1, which another block sends after it has read those of
// t. The same for the branch's sums: they are sent after those of the rows before were added up.
#include "hopper.cuh"
#include "rotation.cuh"

#ifndef SVDQ_CLUSTER  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_CLUSTER 4
#    define SVDQ_ROTATE 0
#    define SVDQ_GELU 0
#    define SVDQ_RANK_TILES 4
#endif

namespace {

constexpr u32 kCluster = SVDQ_CLUSTER, kMostThreads = 896;
constexpr bool kRotate = SVDQ_ROTATE, kGelu = SVDQ_GELU;
constexpr bool kAlone = kRotate && kCluster == 2;  // blocks may have rows of their own
constexpr u32 kRows = 16, kGroupBytes = kRows * 128;
constexpr u32 kFactorBytes = kRotate ? 2 : 4;  // of a column's 1 / smooth_factor
constexpr float kLargestCode = 127.f;

constexpr u32 RT = SVDQ_RANK_TILES, kRanks = 8 * RT;  // of the branch, which none has if rotated
constexpr u32 kWidth = 64;                            // of `down`, zeros behind the rank
constexpr u32 kShares = 2;  // of a block's columns, each its own warps' for the branch
constexpr u32 kBranchWarps = RT / 2 * kShares, kRankBytes = RT * 16;
constexpr u32 kOwnRows = kRows / kCluster;  // that a block adds up for the branch
static_assert(!(kRotate && RT), "r is put in x's place, which the branch would read");
static_assert(kRotate || !kGelu);
static_assert(kCluster > 1 || RT == 0, "sums are sent to other blocks");

struct Arguments {
    TensorMap x;          // (groups, M, 64), boxes of some groups and 16 rows
    TensorMap y;          // likewise, the groups behind those of x
    TensorMap proj_down;  // (K, rank), boxes of some groups and all ranks
    const u16* factor;    // (K,): smooth_factor, or 1 / smooth_factor if rotated
    u8* qact;             // (M, K)
    float* act_scale;     // (M,)
    u16* down;            // (M, 64)
    float* down_scale;    // (M,), powers of two taken out of `down`; fp16 only
    int m, k;
    int block_boxes;        // of a block's part of the columns
    int alone;              // 16 rows each that blocks have of their own; kAlone
    int box_shift;          // a box has 1 << box_shift groups
    int ring_boxes, warps;  // of the ring; that compute
    int x_groups;           // a multiple of a box's; kGelu
};

struct Shared {
    u32 base, ring_boxes, box_bytes, groups, warps;
    u32 factor_groups;  // groups whose 1 / smooth_factor is here

    SVDQ_DEVICE u32 box(u32 i) const {
        return base + i * box_bytes;
    }
    SVDQ_DEVICE u32 proj_down() const {
        return box(ring_boxes);
    }
    SVDQ_DEVICE u32 inverse() const {
        return proj_down() + groups * kGroup * kRankBytes;
    }
    // Of rows 0, 8, 1, 9 and so on.
    SVDQ_DEVICE u32 largest_of_warp(u32 turn, u32 warp) const {
        return inverse() + factor_groups * kGroup * kFactorBytes +
               (turn * warps + warp) * kRows * 4;
    }
    SVDQ_DEVICE u32 largest_of_block(u32 turn, u32 block) const {
        return largest_of_warp(2, 0) + (turn * kCluster + block) * kRows * 4;
    }
    SVDQ_DEVICE u32 factors(u32 turn) const {
        return largest_of_block(2, 0) + turn * kRows * 4;
    }
    SVDQ_DEVICE u32 sums(u32 turn, u32 share) const {
        return factors(2) + (turn * kCluster * kShares + share) * kOwnRows * kRanks * 4;
    }
    SVDQ_DEVICE u32 barrier(u32 i) const {
        return sums(2, 0) + 8 * i;
    }
    // Of two that are used in turn: all warps have noted their largest; all blocks have told; the
    // factors are there; all blocks have sent their sums.
    SVDQ_DEVICE u32 noted(u32 turn) const {
        return barrier(turn);
    }
    SVDQ_DEVICE u32 told(u32 turn) const {
        return barrier(2 + turn);
    }
    SVDQ_DEVICE u32 ready(u32 turn) const {
        return barrier(4 + turn);
    }
    SVDQ_DEVICE u32 summed(u32 turn) const {
        return barrier(6 + turn);
    }
    SVDQ_DEVICE u32 fetched() const {  // proj_down
        return barrier(8);
    }
    SVDQ_DEVICE u32 full(u32 box) const {
        return barrier(9 + box);
    }
    SVDQ_DEVICE u32 empty(u32 box) const {
        return barrier(9 + ring_boxes + box);
    }
};

// Groups of a block in some rows, and the boxes that they come in.
struct Part {
    u32 first, count, boxes;
};

SVDQ_DEVICE Part part_of(const Arguments& p, u32 first, u32 most) {
    const u32 count = max(min((int)most, p.k / kGroup - (int)first), 0);
    return {first, count, (count + (1u << p.box_shift) - 1) >> p.box_shift};
}

// Rows 16 by 16 as a block takes them, and where in the ring their boxes are.
struct Rows {
    const Arguments& p;
    const Part& shared_part;
    u32 tile;
    u32 turn = 0, parity = 0;            // of the barriers that are used in turn
    u32 told_turn = 0, told_parity = 0;  // the same, of shared rows only; kAlone
    u32 box = 0, round = 0;              // the first, and the parity of the ring's round

    SVDQ_DEVICE Rows(const Arguments& p, const Part& shared_part)
        : p(p),
          shared_part(shared_part),
          tile(kAlone && p.alone ? blockIdx.x : blockIdx.x / kCluster) {}

    SVDQ_DEVICE bool alone() const {
        return kAlone && tile < (u32)p.alone;
    }
    // The block's part of these rows.
    SVDQ_DEVICE u32 first_group() const {
        return alone() ? 0 : shared_part.first;
    }
    SVDQ_DEVICE u32 groups() const {
        return alone() ? p.k / kGroup : shared_part.count;
    }
    SVDQ_DEVICE u32 boxes() const {
        return alone() ? (p.k / kGroup + (1 << p.box_shift) - 1) >> p.box_shift : shared_part.boxes;
    }
    SVDQ_DEVICE u32 first() const {
        return tile * kRows;
    }
    SVDQ_DEVICE bool there() const {
        return first() < (u32)p.m;
    }
    // Where box i of these rows is, and its round.
    SVDQ_DEVICE u32 place(u32 i, u32& round_of) const {
        const u32 next = box + i, beyond = next >= (u32)p.ring_boxes;
        round_of = round ^ beyond;
        return beyond ? next - p.ring_boxes : next;
    }
    SVDQ_DEVICE void advance() {
        const u32 passed = boxes();
        if (alone()) {
            tile += gridDim.x;
            if (!alone()) tile = p.alone + blockIdx.x / kCluster;
        } else {
            tile += gridDim.x / kCluster;
            if (kAlone) told_parity ^= told_turn, told_turn ^= 1;
        }
        parity ^= turn;
        turn ^= 1;
        box = place(passed, round);
    }
};

// Where chunk i of a lane's share of 16 rows lies; chunks 2 and 3 are of row g + 8.
SVDQ_DEVICE u32 chunk(u32 rows, u32 g, u32 q, u32 i) {
    return rows + (g + i / 2 * 8) * 128 + (((2 * q + i % 2) ^ g) << 4);
}

SVDQ_DEVICE void load(Pairs& pair, u32 rows, u32 g, u32 q) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const uint4 v = load_shared16(chunk(rows, g, q, i));
        u32* to = &pair[i / 2][i % 2 * 4];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
}

// GELU (tanh form). The hardware's tanh is off by up to 2^-11, which is a fraction of a code's step
// however few codes a row's values reach; it is one special-function instruction, where gelu_tanh
// takes two.
SVDQ_DEVICE float gelu(float x) {
    constexpr float kScale = 0.7978845608028654f;
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * fmaf(0.044715f * kScale, x * x, kScale)));
    return fmaf(0.5f * x, t, 0.5f * x);
}

// A lane's share of 16 rows of a group, smoothed and rotated, over 8. Returns false where that
// overflows, in which case smoothed values need to be clamped. `inverse` is shared memory with its
// 16 columns' factors.
SVDQ_DEVICE bool rotated(Pairs& pair, u32 rows, u32 inverse, u32 g, u32 q, const Signs& signs,
                         bool clamp, bool of_gelu) {
    Pairs smoothed;
    load(smoothed, rows, g, q);
    if (kGelu && of_gelu)
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            u32& x = smoothed[i / 8][i % 8];
            x = T::pack(gelu(T::low(x)), gelu(T::high(x)));
        }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 v = load_shared16(inverse + 16 * i);
        const u32 factors[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            u32& x = smoothed[j / 4][4 * i + j % 4];
            x = T::multiply(x, factors[j % 4]);
            if (clamp) x = T::pack(saturate<T>(T::low(x)), saturate<T>(T::high(x)));
        }
    }
    bool finite = true;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float half[2][4][2];
        finite &= rotate_half(half, smoothed, signs, n);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pair[i / 4][i % 4 * 2 + n] = T::pack(half[i / 4][i % 4][0], half[i / 4][i % 4][1]);
    }
    return __all_sync(0xFFFFFFFFu, finite);
}

// The larger magnitude of a row's pairs.
SVDQ_DEVICE float largest_of(const u32 (&pair)[8]) {
    u32 top = T::magnitudes(pair[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i)
        top = T::larger(top, T::magnitudes(pair[i]));
    top = T::larger(top, top >> 16 | top << 16);
    return T::low(top);
}

// The same of pairs times 16 factors in shared memory.
SVDQ_DEVICE void smoothed_largest(float (&top)[2], const Pairs& pair, u32 inverse) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const uint4 v = load_shared16(inverse + 16 * i);
        const float factors[4] = {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const u32 two = pair[j / 4][2 * i + j % 4 / 2];
            const float value = (j % 2 ? T::high(two) : T::low(two)) * factors[j % 4];
            top[j / 4] = fmaxf(top[j / 4], fabsf(value));
        }
    }
}

// Four values to codes. Adding 12582912 rounds to an integer in a float's low bits.
SVDQ_DEVICE u32 encode(const float (&value)[4], float factor) {
    u32 bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        bits[j] = as_bits(fmaf(value[j], factor, 12582912.f));
    return low_bytes(bits);
}

struct Computing {
    const Arguments& p;
    const Shared& shared;
    const Part& shared_part;
    const u32 warp, lane, g, q;

    SVDQ_DEVICE u32 group(u32 box, u32 i) const {
        return shared.box(box) + (i & ((1u << p.box_shift) - 1)) * kGroupBytes;
    }

    // Notes the largest of each row.
    SVDQ_DEVICE void take(const Rows& rows, const Signs& signs) const {
        float top[2] = {0.f, 0.f};
#pragma unroll 1
        for (u32 i = warp; i < rows.groups(); i += p.warps) {
            u32 round;
            const u32 box = rows.place(i >> p.box_shift, round), at = group(box, i);
            barrier_wait(shared.full(box), round);
            Pairs pair;
            if constexpr (kRotate) {
                // Worked out anew, as below.
                const u32 column =
                    ((kAlone ? rows.first_group() : 0) + i) * kGroup + read_thread_again() % 4 * 16;
                const u32 inverse = shared.inverse() + column * kFactorBytes;
                bool clamp = false;
                const bool of_gelu = kGelu && (int)(rows.first_group() + i) >= p.x_groups;
                while (!rotated(pair, at, inverse, g, q, signs, clamp, of_gelu) && !clamp)
                    clamp = true;
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    const u32* v = &pair[j / 2][j % 2 * 4];
                    store_shared16(chunk(at, g, q, j), v[0], v[1], v[2], v[3]);
                }
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    top[h] = fmaxf(top[h], largest_of(pair[h]));
            } else {
                load(pair, at, g, q);
                smoothed_largest(top, pair, shared.inverse() + (i * kGroup + 16 * q) * 4);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            top[h] = quad_max(fminf(top[h], kFloatMax));
        if (kRotate) fence_stores();  // copies will write over r
        // Worked out anew: there is no register to keep it in.
        const u32 thread = read_thread_again();
        if (thread % 4 == 0) {
            store_shared8(shared.largest_of_warp(rows.turn, thread / 32) + thread % 32 / 4 * 8,
                          as_bits(top[0]), as_bits(top[1]));
            barrier_arrive(shared.noted(rows.turn));
        }
    }

    template <bool Clamp>
    SVDQ_DEVICE void encode_groups(const Rows& rows, const float (&factor)[2]) const {
#pragma unroll 1
        for (u32 i = warp; i < rows.boxes() << p.box_shift; i += p.warps) {
            u32 round;
            const u32 box = rows.place(i >> p.box_shift, round);
            if (i >= rows.groups()) {  // there is no such group, but all of a box's are waited for
                if (lane == 0) barrier_arrive(shared.empty(box));
                continue;
            }
            Pairs pair;
            load(pair, group(box, i), g, q);
            u32 codes[2][4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                float inverse[4] = {1.f, 1.f, 1.f, 1.f};
                if (!kRotate) {
                    const uint4 v =
                        load_shared16(shared.inverse() + (i * kGroup + 16 * q + 4 * j) * 4);
                    inverse[0] = as_float(v.x), inverse[1] = as_float(v.y);
                    inverse[2] = as_float(v.z), inverse[3] = as_float(v.w);
                }
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    const u32 low = pair[h][2 * j], high = pair[h][2 * j + 1];
                    float value[4] = {T::low(low), T::high(low), T::low(high), T::high(high)};
#pragma unroll
                    for (int c = 0; c < 4 && !kRotate; ++c)
                        value[c] *= inverse[c];
#pragma unroll
                    for (int c = 0; c < 4 && Clamp; ++c)
                        value[c] = fminf(fmaxf(value[c], -kFloatMax), kFloatMax);
                    codes[h][j] = encode(value, factor[h]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.empty(box));
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                const u32 row = rows.first() + g + 8 * h;
                if (row < (u32)p.m)
                    *(uint4*)(p.qact + (u64)row * p.k + (rows.first_group() + i) * kGroup +
                              16 * q) =
                        make_uint4(codes[h][0], codes[h][1], codes[h][2], codes[h][3]);
            }
        }
    }

    SVDQ_DEVICE void encode_and_leave(const Rows& rows) const {
        barrier_wait(shared.ready(rows.turn), rows.parity);
        // A quad's first lane reads them for all four, since it is the one that arrives at `noted`.
        float factor[2] = {0.f, 0.f};
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            if (q == 0)
                factor[h] = as_float(load_shared4(shared.factors(rows.turn) + (g + 8 * h) * 4));
            factor[h] = __shfl_sync(0xFFFFFFFFu, factor[h], lane & ~3u);
        }
        // What overflowed when it was smoothed is as large as can be.
        constexpr float kOfOverflow = kLargestCode / kFloatMax;
        const float least = fminf(factor[0], factor[1]);
        if (!kRotate && __any_sync(0xFFFFFFFFu, least <= kOfOverflow))
            encode_groups<true>(rows, factor);
        else
            encode_groups<false>(rows, factor);
    }

    SVDQ_DEVICE void fill_inverse() const {
        const u32 count = kAlone ? p.k / kGroup : shared_part.count;
        const u16* const from = p.factor + (kAlone ? 0 : shared_part.first * kGroup);
        for (u32 i = warp * 32 + lane; i < count * kGroup / 8; i += p.warps * 32) {
            const uint4 v = ((const uint4*)from)[i];
            const u32 pairs[4] = {v.x, v.y, v.z, v.w};
            if constexpr (kRotate) {
                store_shared16(shared.inverse() + 16 * i, v.x, v.y, v.z, v.w);
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; ++j)
                    store_shared8(shared.inverse() + 32 * i + 8 * j,
                                  as_bits(1.f / T::low(pairs[j])),
                                  as_bits(1.f / T::high(pairs[j])));
            }
        }
        warps_sync(2, p.warps * 32);
    }

    SVDQ_DEVICE void run() const {
        fill_inverse();
        const Signs signs(g, q);
        // Where the ring has room for both, the next rows are taken before these are encoded.
        const int most = p.ring_boxes >= 2 * (int)Rows(p, shared_part).boxes() ? 2 : 1;
        int taken = 0;
        Rows next(p, shared_part);
        for (Rows rows(p, shared_part); rows.there(); rows.advance(), --taken) {
#pragma unroll 1
            for (; taken < most && next.there(); next.advance(), ++taken)
                take(next, signs);
            encode_and_leave(rows);
        }
    }
};

// Tells the cluster's blocks the block's largest, and the block's warps what the rows' factors are.
SVDQ_DEVICE void tell(const Arguments& p, const Shared& shared, const Part& shared_part, u32 lane) {
    for (Rows rows(p, shared_part); rows.there(); rows.advance()) {
        barrier_wait(shared.noted(rows.turn), rows.parity);
        float top = 0.f;  // of row `lane`
        if (lane < kRows)
            for (u32 warp = 0; warp < p.warps; ++warp)
                top = fmaxf(top, as_float(load_shared4(shared.largest_of_warp(rows.turn, warp) +
                                                       lane % 8 * 8 + lane / 8 * 4)));
        const bool alone = kCluster == 1 || rows.alone();
        const u32 told_turn = kAlone ? rows.told_turn : rows.turn;
        if (!alone) {
            const u32 four = lane % 4 * 4;
            const uint4 tops = make_uint4(as_bits(__shfl_sync(0xFFFFFFFFu, top, four)),
                                          as_bits(__shfl_sync(0xFFFFFFFFu, top, four + 1)),
                                          as_bits(__shfl_sync(0xFFFFFFFFu, top, four + 2)),
                                          as_bits(__shfl_sync(0xFFFFFFFFu, top, four + 3)));
            const u32 told = shared.told(told_turn), block = blockIdx.x % kCluster;
            if (lane == 0) barrier_expect(told, kCluster * kRows * 4);
            if (lane < 4 * kCluster)
                store_shared16_at(shared.largest_of_block(told_turn, block) + four * 4, tops, told,
                                  lane / 4);
            barrier_wait(told, kAlone ? rows.told_parity : rows.parity);
        }
        if (lane < kRows) {
            float largest = alone ? top : 0.f;
#pragma unroll
            for (u32 block = 0; block < kCluster && !alone; ++block)
                largest = fmaxf(
                    largest,
                    as_float(load_shared4(shared.largest_of_block(told_turn, block) + lane * 4)));
            // Below this the reciprocal overflows; such a row is zero for all purposes.
            const bool zero = !(largest > kFloatTiny * kLargestCode);
            store_shared4(shared.factors(rows.turn) + lane * 4,
                          zero ? 0 : as_bits(__fdiv_rn(kLargestCode, largest)));
            const u32 row = rows.first() + lane;
            if ((alone || blockIdx.x % kCluster == 0) && row < (u32)p.m) {
                const float scale = kRotate ? fminf(largest * (8.f / kLargestCode), kFloatMax)
                                            : __fdiv_rn(largest, kLargestCode);
                p.act_scale[row] = zero ? 0.f : scale;
            }
            barrier_arrive(shared.ready(rows.turn));
        }
    }
}

SVDQ_DEVICE void copy(const Arguments& p, const Shared& shared, const Part& shared_part) {
    for (Rows rows(p, shared_part); rows.there(); rows.advance()) {
#pragma unroll 1
        for (u32 i = 0; i < rows.boxes(); ++i) {
            u32 round;
            const u32 box = rows.place(i, round), full = shared.full(box);
            barrier_wait(shared.empty(box), round ^ 1);
            barrier_expect(full, shared.box_bytes);
            const int group = rows.first_group() + (i << p.box_shift), beyond = group - p.x_groups;
            const bool of_gelu = kGelu && beyond >= 0;
            tensor_load_3d(shared.box(box), of_gelu ? p.y : p.x, 0, rows.first(),
                           of_gelu ? beyond : group, full);
        }
        if (RT && rows.tile == blockIdx.x / kCluster) {  // behind the first rows
            const u32 columns = kGroup << min(p.box_shift, 2), all = shared.groups * kGroup;
            barrier_expect(shared.fetched(), all * kRankBytes);
            for (u32 i = 0; i < all; i += columns)
                tensor_load(shared.proj_down() + i * kRankBytes, p.proj_down, 0,
                            shared_part.first * kGroup + i, shared.fetched());
        }
    }
}

#if SVDQ_RANK_TILES
// Where chunk `i` of 8 ranks of a row of the block's proj_down lies, by the copy's swizzle: the
// eight rows that a matrix is loaded from meet no bank twice.
SVDQ_DEVICE u32 proj_down_at(u32 base, u32 row, u32 i) {
    const u32 swizzle = RT == 8 ? row % 8 : row / 2 % 4;
    return base + row * kRankBytes + ((i ^ swizzle) << 4);
}

struct Branch {
    const Arguments& p;
    const Shared& shared;
    const Part& shared_part;
    const u32 warp, lane, g, q;

    SVDQ_DEVICE u32 rank() const {  // the first of the warp's 16
        return warp / kShares * 16;
    }
    SVDQ_DEVICE u32 share() const {  // odd or even groups
        return warp % kShares;
    }

    // Element 2 h + e of sum[n]: row g + 8 h, rank() + 8 n + 2 q + e. Of two chains of products,
    // which would wait for each other in one.
    SVDQ_DEVICE void multiply(float (&sum)[2][4], const Rows& rows) const {
        const u32 row = lane % 16, half = lane / 16;
        float chain[2][2][4] = {};
#    pragma unroll 1
        for (u32 i = 0; i < shared_part.boxes; ++i) {
            u32 round;
            const u32 box = rows.place(i, round);
            const u32 end = min((i + 1) << p.box_shift, shared_part.count);
            barrier_wait(shared.full(box), round);
            const u32 first = i << p.box_shift;
#    pragma unroll 1
            for (u32 group = first + (first ^ share()) % kShares; group < end; group += kShares) {
                const u32 x = shared.box(box) + (group - first) * kGroupBytes + row * 128;
                u32 a[4][4], b[4][4];
#    pragma unroll
                for (u32 s = 0; s < 4; ++s) {
                    load_matrices(a[s], x + (((2 * s + half) ^ row % 8) << 4));
                    load_matrices_transposed(
                        b[s], proj_down_at(shared.proj_down(), group * kGroup + 16 * s + row,
                                           rank() / 8 + half));
                }
#    pragma unroll
                for (u32 s = 0; s < 4; ++s) {
                    mma_16bit<T>(chain[s % 2][0], a[s], b[s][0], b[s][1]);
                    mma_16bit<T>(chain[s % 2][1], a[s], b[s][2], b[s][3]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.empty(box));
        }
#    pragma unroll
        for (int n = 0; n < 2; ++n)
#    pragma unroll
            for (int e = 0; e < 4; ++e)
                sum[n][e] = chain[0][n][e] + chain[1][n][e];
    }

    // To the blocks that add up these rows.
    SVDQ_DEVICE void send(const float (&sum)[2][4], const Rows& rows) const {
        const u32 summed = shared.summed(rows.turn);
        if (warp == 0 && lane == 0) barrier_expect(summed, kRows * kRanks * kShares * 4);
#    pragma unroll
        for (u32 h = 0; h < 2; ++h)
#    pragma unroll
            for (u32 n = 0; n < 2; ++n) {
                const u32 row = g + 8 * h, at = rank() + 8 * n + 2 * q;
                store_shared8_at(shared.sums(rows.turn, blockIdx.x % kCluster * kShares + share()) +
                                     (row % kOwnRows * kRanks + at) * 4,
                                 as_bits(sum[n][2 * h]), as_bits(sum[n][2 * h + 1]), summed,
                                 row / kOwnRows);
            }
    }

    // Of this block's rows, each some lanes', all shares in a fixed order.
    SVDQ_DEVICE void add_up(const Rows& rows) const {
        constexpr u32 kLanes = 32 / kOwnRows, kPairs = kRanks / 2 / kLanes;
        barrier_wait(shared.summed(rows.turn), rows.parity);
        const u32 own = lane / kLanes, row = rows.first() + blockIdx.x % kCluster * kOwnRows + own;
        float sum[kPairs][2] = {}, largest = 0.f;
#    pragma unroll
        for (u32 i = 0; i < kPairs; ++i) {
            const u32 rank = (i * kLanes + lane % kLanes) * 2;
#    pragma unroll
            for (u32 share = 0; share < kCluster * kShares; ++share) {
                const uint2 v =
                    load_shared8(shared.sums(rows.turn, share) + (own * kRanks + rank) * 4);
                sum[i][0] += as_float(v.x);
                sum[i][1] += as_float(v.y);
            }
            largest = fmaxf(largest, fmaxf(fabsf(sum[i][0]), fabsf(sum[i][1])));
        }
        float power = 1.f;
        if (!T::kIsBf16) {
#    pragma unroll
            for (u32 mask = 1; mask < kLanes; mask *= 2)
                largest = fmaxf(largest, shuffle_xor(largest, mask));
            power = down_power(largest);
        }
        if (row >= (u32)p.m) return;
        if (!T::kIsBf16 && lane % kLanes == 0) p.down_scale[row] = 1.f / power;
        u32* const to = (u32*)(p.down + (u64)row * kWidth) + lane % kLanes;
#    pragma unroll
        for (u32 i = 0; i < kWidth / 2 / kLanes; ++i)
            to[i * kLanes] = i < kPairs ? pack_down<T>(sum[i][0] * power, sum[i][1] * power) : 0;
    }

    SVDQ_DEVICE void run() const {
        barrier_wait(shared.fetched(), 0);
        Rows before(p, shared_part);
        for (Rows rows(p, shared_part); rows.there(); rows.advance()) {
            float sum[2][4] = {};
            multiply(sum, rows);
            if (before.tile != rows.tile) {
                if (warp == 0) add_up(before);
                before.advance();
            }
            warps_sync(1, kBranchWarps * 32);  // what is sent may replace what was added up
            send(sum, rows);
        }
        if (warp == 0 && before.there()) add_up(before);
    }
};
#endif

}  // namespace

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kMostThreads, 1)
    svdq_quantize_rows(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    const u32 g = lane / 4, q = lane % 4;
    const u32 block_groups = p.block_boxes << p.box_shift;
    const Part shared_part = part_of(p, blockIdx.x % kCluster * block_groups, block_groups);
    const Shared shared{
        shared_address(memory), (u32)p.ring_boxes, kGroupBytes << p.box_shift,
        block_groups,           (u32)p.warps,      kAlone ? (u32)p.k / kGroup : block_groups};

    if (warp == 0) {
        for (u32 box = lane; box < p.ring_boxes; box += 32) {
            barrier_init(shared.full(box), 1);
            barrier_init(shared.empty(box), (1u << p.box_shift) + kBranchWarps);
        }
        if (lane == 0) barrier_init(shared.fetched(), 1);
        if (lane < 2) {
            barrier_init(shared.noted(lane), p.warps * 8);
            barrier_init(shared.told(lane), 1);
            barrier_init(shared.ready(lane), kRows);
            barrier_init(shared.summed(lane), 1);
        }
        fence_barrier_init();
    }
    cluster_arrive();
    for (u32 column = threadIdx.x * 64; column < (u32)p.k; column += blockDim.x * 64)
        prefetch_line(p.factor + column);
    wait_for_kernel_before();
    let_next_kernel_start();
    __syncthreads();
    cluster_wait();

    if (warp < p.warps)
        Computing{p, shared, shared_part, warp, lane, g, q}.run();
    else if (warp == p.warps)
        tell(p, shared, shared_part, lane);
    else if (warp == p.warps + 1) {
        if (lane == 0) copy(p, shared, shared_part);
    }
#if SVDQ_RANK_TILES
    else
        Branch{p, shared, shared_part, warp - p.warps - 2, lane, g, q}.run();
#endif
    __syncwarp();
    // Nobody leaves while another block may still write to its memory. What one writes there is
    // waited for, so nothing is left to be ordered.
    cluster_arrive();
    cluster_wait();
}
