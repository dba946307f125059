// y = x . W^T + bias for at most eight rows of x, W = (code - 8) * scale + zero in groups of 64
// columns. For modulation layers, whose input is one row an image: reading W is all the work.
//
// Tensor cores make the products, with W on the left: its 16 x 16 fragments meet 16 x 8 of x^T, so
// eight rows of x cost what one does. Codes plus an offset are exact in 16 bits; a group's sums,
// and those of x alone, which the zeros want, are float32 and are scaled when the group ends (24 is
// the offset and the codes' centre):
//
//     y[n] += scale[g, n] * (sum of (code + 16) * x - 24 * sum of x) + zero[g, n] * (sum of x)
//
//                     K
//                warp 0 | warp 1 | ...    Block b has the tiles of 16 outputs b, b + blocks and so
//     tile b      256   |  256   |        on: the card reads W from its beginning to its end. A
//     b + blocks        |        |        warp has four groups of K, and x of them in registers. It
//     b + 2 blocks      |        |        runs alone, with copies STAGES - 1 tiles ahead, and keeps
//     ...               |        |        its sums; in the end the block adds them up.
//
// Where the warps of a block cannot cover K, they go through the tiles again with other groups.
// Where N is an odd number of eights, the last tile begins eight early.
//
//     shared memory:  stages [warp][STAGES]  |  bias [tile][16]  |  sums [tile][warp][row of x][16]
//     a stage:        codes, 16 rows of 128 bytes | scales, 4 groups of 16 | zeros, 4 groups of 16
//                     chunk c of row r at c ^ (2 * (r / 2 % 4))
//
// Row g of a fragment is output 2g, row g + 8 output 2g + 1 (g = lane / 4, q = lane % 4), so a
// lane's two scales are a word. In a group lane q has columns 16q .. 16q + 15; nibbles j and j + 4
// of a word of codes are a pair of a product's operand, and x is paired alike.
#include "device.cuh"

#ifndef SVDQ_WARPS  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_WARPS 12
#    define SVDQ_STAGES 2
#endif

namespace {

constexpr int kStages = SVDQ_STAGES;
constexpr int kRows = 16, kGroups = 4;  // of a stage
constexpr int kRowBytes = kGroups * kGroup / 2;
constexpr int kCodes = kRows * kRowBytes, kScales = kRows * kGroups * 2;
constexpr int kStageBytes = kCodes + 2 * kScales;

struct Arguments {
    const u16* x;      // (M, K)
    const u8* weight;  // (N, K / 2)
    const u16* scale;  // (K / 64, N)
    const u16* zero;   // (K / 64, N)
    const u16* bias;   // (N,) or null
    u16* out;          // (M, N)
    int m, n, k;
    int rounds;         // until the warps have gone through K
    int tiles, longer;  // of a block; the first `longer` blocks have one more
};

// A nibble in the mantissa's place of 8, 4, 2 and 1 of a number in [16, 32) makes it 16 + code.
constexpr u32 kSixteen = T::kIsBf16 ? 0x41804180u : 0x4C004C00u;
constexpr int kPlace = T::kIsBf16 ? 3 : 6;
constexpr u32 kMask = 0x000F000Fu << kPlace;
constexpr float kOffset = 16.f + 8.f;  // with the codes' centre

// Nibbles J and J + 4 of a word as 16-bit numbers. With the mask in a register, 2 instructions.
template <int J>
SVDQ_DEVICE u32 decode(u32 word, u32 mask) {
    constexpr int kLeft = kPlace - 4 * J;
    if constexpr (kLeft > 0)
        return (word << kLeft & mask) | kSixteen;
    else
        return (word >> -kLeft & mask) | kSixteen;
}

// The same value, of which the compiler cannot tell how it came about: it keeps it in a register
// where it would compute it anew for every tile.
SVDQ_DEVICE u32 kept(u32 value) {
    return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x % 32);
}

// Of a group, a lane's 16 columns of a row of x.
struct Columns {
    uint4 first, second;

    SVDQ_DEVICE void read(const u16* x) {
        first = ((const uint4*)x)[0];
        second = ((const uint4*)x)[1];
    }
};

// The same, paired as codes are; sums of two rows of x, and what the group's products with codes
// start from.
struct Operand {
    u32 pair[8];
    float sum[2], start[4];

    SVDQ_DEVICE void take(const Columns& x) {
        const u32 from[8] = {x.first.x,  x.first.y,  x.first.z,  x.first.w,
                             x.second.x, x.second.y, x.second.z, x.second.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pair[i] = __byte_perm(from[i / 4 * 4 + i % 4 / 2], from[i / 4 * 4 + i % 4 / 2 + 2],
                                  i % 2 ? 0x7632 : 0x5410);
        constexpr u32 kOne = T::kIsBf16 ? 0x3F803F80u : 0x3C003C00u;
        const u32 ones[4] = {kOne, kOne, kOne, kOne};
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i += 2)
            mma_16bit<T>(sums, ones, pair[i], pair[i + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            sum[e % 2] = sums[e];
            start[e] = as_float(kept(as_bits(-kOffset * sums[e])));
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(SVDQ_WARPS * 32, 1) svdq_gemv_awq(const Arguments p) {
    extern __shared__ __align__(128) u8 shared[];
    const u32 lane = kept(threadIdx.x % 32);
    const int warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int warps = blockDim.x / 32, groups = p.k / kGroup;

    // x comes first: behind the copies of W it would wait for all of them. In place of rows and
    // groups that x does not have others are read: their sums are not used.
    const u16* const x_row = p.x + (u32)min(g, p.m - 1) * p.k + q * 16;
    Columns columns[kGroups];
    auto read_x = [&](int round) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            columns[i].read(x_row + min((round * warps + warp) * kGroups + i, groups - 1) * kGroup);
    };
    read_x(0);

    // Copies: 16 bytes of rows lane / 8 + 4i, and with 16 of the lanes those of the same groups'
    // scales and zeros.
    const int block = blockIdx.x, tiles = p.tiles + (block < p.longer ? 1 : 0);
    const int first_n = block * kRows, step_n = gridDim.x * kRows, last_n = p.n - kRows;
    const u32 stages = kept(shared_address(shared + warp * kStages * kStageBytes));
    const u32 row_bytes = p.k / 2, row = lane / 8, chunk = lane % 8;
    const u32 to = kept(row * kRowBytes + ((chunk ^ row / 2 * 2) << 4)), to_odd = kept(to ^ 64);
    const u32 scale_to = kept(kCodes + lane * 16);
    const u16* const scales = (lane < 8 ? p.scale : p.zero) + lane % 2 * 8;
    int copies = p.rounds * tiles, copy_n = first_n, copy_group = warp * kGroups + lane % 8 / 2;
    u32 copy_slot = stages;
    auto copy_stage = [&]() {
        if (--copies >= 0) {
            const u32 n = min(copy_n, last_n);
            const u32 group = min(copy_group, groups - 1);
            const u8* const codes =
                p.weight + ((n + row) * row_bytes + group * (kGroup / 2) + lane % 2 * 16);
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i)
                copy_or_zero<16>(copy_slot + (i % 2 ? to_odd : to) + i * 4 * kRowBytes,
                                 codes + i * 4 * row_bytes, true);
            // Where K has ended, scales of zero keep out what is read.
            if (lane < 16)
                copy_or_zero<16>(copy_slot + scale_to, scales + (group * p.n + n),
                                 copy_group < groups);
            copy_n += step_n;
            if (copy_n == first_n + tiles * step_n) {
                copy_n = first_n;
                copy_group += warps * kGroups;
            }
            copy_slot += kStageBytes;
            if (copy_slot == stages + kStages * kStageBytes) copy_slot = stages;
        }
        copy_commit();
    };
    u16* const bias = (u16*)(shared + warps * kStages * kStageBytes);
    if (p.bias)
        for (int i = threadIdx.x; i < tiles * 2; i += warps * 32)
            copy_or_zero<16>(shared_address(bias + i * 8),
                             p.bias + min(first_n + i / 2 * step_n, last_n) + i % 2 * 8, true);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s)
        copy_stage();

    const u32 codes_at = kept(2 * g * kRowBytes + g % 4 * 32 + q * 8),
              scales_at = kept(kCodes + g * 4);
    // K is even. Of a mere constant the compiler would make a register anew for every word.
    const u32 mask = p.k % 2 ? 0 : kMask;
    float* const sums = (float*)(bias + tiles * kRows);
    const u32 sums_stride = warps * p.m * kRows * 4;
    const u32 sums_start = kept(shared_address(sums + (warp * p.m + 2 * q) * kRows + 2 * g));
    u32 slot = stages;
    for (int round = 0; round < p.rounds; ++round) {
        Operand x[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            x[i].take(columns[i]);
        u32 sums_at = sums_start;
        for (int tile = 0; tile < tiles; ++tile, sums_at += sums_stride) {
            copy_stage();
            copy_wait<kStages - 1>();
            __syncwarp();
            float acc[4] = {};
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                const uint2 even = load_shared8((slot + codes_at) ^ i * 32);
                const uint2 odd = load_shared8(((slot + codes_at) ^ i * 32) + kRowBytes);
                const u32 scale = load_shared4(slot + scales_at + i * kRows * 2);
                const u32 zero = load_shared4(slot + scales_at + kScales + i * kRows * 2);
                float products[4] = {x[i].start[0], x[i].start[1], x[i].start[2], x[i].start[3]};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u32 word[2] = {half ? even.y : even.x, half ? odd.y : odd.x};
                    const u32 low[4] = {decode<0>(word[0], mask), decode<0>(word[1], mask),
                                        decode<1>(word[0], mask), decode<1>(word[1], mask)};
                    const u32 high[4] = {decode<2>(word[0], mask), decode<2>(word[1], mask),
                                         decode<3>(word[0], mask), decode<3>(word[1], mask)};
                    mma_16bit<T>(products, low, x[i].pair[4 * half], x[i].pair[4 * half + 1]);
                    mma_16bit<T>(products, high, x[i].pair[4 * half + 2], x[i].pair[4 * half + 3]);
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float s = e < 2 ? T::low(scale) : T::high(scale);
                    const float z = e < 2 ? T::low(zero) : T::high(zero);
                    acc[e] = fmaf(s, products[e], fmaf(z, x[i].sum[e % 2], acc[e]));
                }
            }
            slot += kStageBytes;
            if (slot == stages + kStages * kStageBytes) slot = stages;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (2 * q + h >= p.m) break;
                const u32 at = sums_at + h * kRows * 4;
                if (round) {
                    const uint2 before = load_shared8(at);
                    acc[h] += as_float(before.x);
                    acc[2 + h] += as_float(before.y);
                }
                store_shared8(at, as_bits(acc[h]), as_bits(acc[2 + h]));
            }
            __syncwarp();
        }
        // After the last round for nothing, but under a condition the compiler would pair x for
        // every tile anew.
        read_x(round + 1);
    }

    copy_wait<0>();
    __syncthreads();
    // Four outputs of a row of x for each thread.
    const int quads = p.m * (kRows / 4);
    for (int i = threadIdx.x; i < tiles * quads; i += warps * 32) {
        const int tile = i / quads, quad = i % quads, m = quad / (kRows / 4);
        const int column = quad % (kRows / 4) * 4,
                  n = min(first_n + tile * step_n, last_n) + column;
        uint2 first = make_uint2(0, 0);
        if (p.bias) first = *(const uint2*)(bias + tile * kRows + column);
        float y[4] = {T::low(first.x), T::high(first.x), T::low(first.y), T::high(first.y)};
        const float4* from = (const float4*)sums + tile * warps * quads + quad;
#pragma unroll 4
        for (int w = 0; w < warps; ++w) {
            const float4 v = from[w * quads];
            y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
        }
        *(uint2*)(p.out + (u32)m * p.n + n) =
            make_uint2(T::pack(saturate<T>(y[0]), saturate<T>(y[1])),
                       T::pack(saturate<T>(y[2]), saturate<T>(y[3])));
    }
}
