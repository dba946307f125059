// y = x . W^T + bias for at most eight rows of x, W = (code - 8) * scale + zero in groups of 64
// columns. For modulation layers, whose input is one row an image: reading W is all the work.
//
// Tensor cores make the products, with W on the left: its 16 x 16 fragments meet 16 x 8 of x^T, so
// eight rows of x cost what one does. Codes plus an offset are exact in 16 bits; a group's sums,
// and those of x alone, which the zeros want, are float32 and are scaled when the group ends:
//
//     y[n] += scale[g, n] * (sum of (code + 128) * x) + (zero - 136 scale)[g, n] * (sum of x)
//
// A block has 16 outputs. Its warps take turns at steps of four groups, each with STAGES of its
// own: of W a lane copies what lies together in memory, 16 bytes at a time, STAGES - 1 steps ahead.
//
//     stage:   codes, 16 rows of 128 bytes | scales, 4 groups of 16 | zeros, 4 groups of 16
//              chunk c of row r at c ^ (2 * (r / 2 % 4))
//
// Row g of a fragment is output 2g, row g + 8 output 2g + 1 (g = lane / 4, q = lane % 4), so a
// lane's two scales are a word. In a group lane q has columns 16q .. 16q + 15; nibbles j and j + 4
// of a word of codes are a pair of a product's operand, and x is paired alike.
#include "device.cuh"

#ifndef SVDQ_BF16  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_BF16 1
#    define SVDQ_WARPS 4
#    define SVDQ_STAGES 2
#    define SVDQ_MIN_BLOCKS 5
#endif

namespace {

#if SVDQ_BF16
using T = Bf16;
#else
using T = Fp16;
#endif
constexpr int kWarps = SVDQ_WARPS, kStages = SVDQ_STAGES;
constexpr int kRows = 16, kMostM = 8;
constexpr int kStep = 4;  // groups of a stage
constexpr int kCodes = kRows * kStep * kGroup / 2;
constexpr int kScales = kRows * kStep * 2;
constexpr int kStageBytes = kCodes + 2 * kScales;
static_assert(kStages * kStageBytes >= kRows * kMostM * 4, "a warp's sums take its stages' place");

struct Arguments {
    const u16* x;      // (M, K)
    const u8* weight;  // (N, K / 2)
    const u16* scale;  // (K / 64, N)
    const u16* zero;   // (K / 64, N)
    const u16* bias;   // (N,) or null
    u16* out;          // (M, N)
    int m, n, k;
};

// Behind a suitable exponent a nibble is the last digits of a number: 128 + code in bf16, 1024 +
// code in fp16. What that adds to a group's sum, the zero takes off again.
constexpr u32 kExponent = T::kIsBf16 ? 0x43004300u : 0x64006400u;
constexpr float kOffset = T::kIsBf16 ? 136.f : 1032.f;  // with the centre, 8

// Nibbles `shift` / 4 and that + 4 of a word as 16-bit numbers.
SVDQ_DEVICE u32 decode(u32 word, int shift) {
    return (word >> shift & 0x000F000Fu) | kExponent;
}

// The 16 columns of x that a lane has in a group, paired as codes are.
struct Columns {
    u32 pair[8];

    SVDQ_DEVICE Columns(const uint4& first, const uint4& second) {
        const u32 from[8] = {first.x,  first.y,  first.z,  first.w,
                             second.x, second.y, second.z, second.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pair[i] = __byte_perm(from[i / 4 * 4 + i % 4 / 2], from[i / 4 * 4 + i % 4 / 2 + 2],
                                  i % 2 ? 0x7632 : 0x5410);
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps * 32, SVDQ_MIN_BLOCKS)
    svdq_gemv_awq(const Arguments p) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int n0 = blockIdx.x * kRows;
    const int groups = p.k / kGroup, steps = (groups + kStep - 1) / kStep;
    u8* const stages = shared + warp * kStages * kStageBytes;

    auto load_stage = [&](int step) {
        u8* const stage = stages + step / kWarps % kStages * kStageBytes;
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
            const int row = lane / 8 + 4 * i, chunk = lane % 8;
            copy_or_zero<16>(
                shared_address(stage + row * 128 + ((chunk ^ row / 2 % 4 * 2) << 4)),
                p.weight + ((u64)(n0 + row) * p.k + (step * kStep * kGroup + chunk * 32)) / 2,
                n0 + row < p.n && step * kStep + chunk / 2 < groups);
        }
        if (lane < 16) {
            const int group = step * kStep + lane / 2 % 4, n = n0 + lane % 2 * 8;
            copy_or_zero<16>(shared_address(stage + kCodes + lane * 16),
                             (lane < 8 ? p.scale : p.zero) + (u64)group * p.n + n,
                             group < groups && n < p.n);
        }
    };

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (warp + s * kWarps < steps) load_stage(warp + s * kWarps);
        copy_commit();
    }

    // In place of rows and groups that x does not have others are read: their sums are not used.
    const u16* const x_row = p.x + (u64)min(g, p.m - 1) * p.k + q * 16;
    float acc[4] = {};
    for (int step = warp; step < steps; step += kWarps) {
        const int next = step + (kStages - 1) * kWarps;
        if (next < steps) load_stage(next);
        copy_commit();
        // x is on its way while the wait for W is on.
        uint4 x[kStep][2];
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            const int group = min(step * kStep + i, groups - 1);
            const uint4* from = (const uint4*)(x_row + group * kGroup);
            x[i][0] = from[0];
            x[i][1] = from[1];
        }
        copy_wait<kStages - 1>();
        __syncwarp();
        const u8* const stage = stages + step / kWarps % kStages * kStageBytes;
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            const Columns columns(x[i][0], x[i][1]);
            const u32 chunk = (2 * i + q / 2) ^ g % 4 * 2;
            const u8* const codes = stage + 2 * g * 128 + (chunk << 4) + q % 2 * 8;
            const uint2 even = *(const uint2*)codes, odd = *(const uint2*)(codes + 128);
            const u32 left[2][2] = {{even.x, odd.x}, {even.y, odd.y}};
            float sums[4] = {}, of_x[4] = {};
#pragma unroll
            for (int product = 0; product < 4; ++product) {
                const u32(&word)[2] = left[product / 2];
                const int shift = product % 2 * 8;
                const u32 a[4] = {decode(word[0], shift), decode(word[1], shift),
                                  decode(word[0], shift + 4), decode(word[1], shift + 4)};
                const u32 one = T::kIsBf16 ? 0x3F803F80u : 0x3C003C00u,
                          ones[4] = {one, one, one, one};
                mma_16bit<T>(sums, a, columns.pair[2 * product], columns.pair[2 * product + 1]);
                mma_16bit<T>(of_x, ones, columns.pair[2 * product], columns.pair[2 * product + 1]);
            }
            const u32 scale = *(const u32*)(stage + kCodes + i * kRows * 2 + g * 4);
            const u32 zero = *(const u32*)(stage + kCodes + kScales + i * kRows * 2 + g * 4);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float s = e < 2 ? T::low(scale) : T::high(scale);
                const float z = fmaf(-kOffset, s, e < 2 ? T::low(zero) : T::high(zero));
                acc[e] = fmaf(s, sums[e], fmaf(z, of_x[e], acc[e]));
            }
        }
        __syncwarp();
    }

    // The warps' sums, where the stages were: [warp][row of x][output].
    copy_wait<0>();
    __syncthreads();
    float* const total = (float*)shared;
#pragma unroll
    for (int e = 0; e < 4; ++e)
        total[(warp * kMostM + 2 * q + e % 2) * kRows + 2 * g + e / 2] = acc[e];
    __syncthreads();
    for (int i = threadIdx.x; i < kMostM * kRows; i += kWarps * 32) {
        const int m = i / kRows, n = n0 + i % kRows;
        if (m >= p.m || n >= p.n) continue;
        float sum = p.bias ? T::low(p.bias[n]) : 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
            sum += total[w * kMostM * kRows + i];
        p.out[(u64)m * p.n + n] = (u16)T::pack(saturate<T>(sum), 0.f);
    }
}
