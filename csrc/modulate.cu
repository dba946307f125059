// Between two linear layers of a block, over the rows of x (M, C), each read once:
//
//     h = x + gate * y              SVDQ_GATED
//     z = norm(h) * (1 + scale) + shift,   norm(h) = (h - mean) / sqrt(variance + epsilon)
//                                   SVDQ_NORMED
//
// gate, scale and shift are the image's own: rows of a modulation's output, which M / B rows share.
//
//     row      0 .. 1023     1024 .. 2047     ...     a block has a row, and a thread eight
//            | thread 0 .. | thread 0 ..   |  ...     columns of every 1024: it keeps them in
//                                                     registers, since the mean is known at the
//                                                     row's end
//
// Everything that does not depend on the mean is read before anything is written: reads do not pass
// writes, which to the compiler could be to the same place.
//
// fp16 overflows where bf16 does not: h is saturated, and what is no number in it becomes zero, as
// the host's blocks end.
#include "device.cuh"

#ifndef SVDQ_GATED  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_GATED 1
#    define SVDQ_NORMED 1
#endif

namespace {

constexpr bool kGated = SVDQ_GATED, kNormed = SVDQ_NORMED;
constexpr int kThreads = 128, kPieces = 4;  // of 8 kThreads columns each, at most

struct Arguments {
    const u16* x;      // (M, C), C a multiple of 8
    const u16* y;      // (M, C)
    const u16* gate;   // (B, C), rows gate_stride apart
    const u16* scale;  // (B, C), rows norm_stride apart
    const u16* shift;  // likewise
    u16* h;            // (M, C)
    u16* z;            // (M, C)
    int c, rows;       // rows that share a modulation
    int gate_stride, norm_stride;
    float epsilon;
};

// Over the block; `parts` is shared memory for its warps' sums.
SVDQ_DEVICE float sum_of_block(float value, float* parts) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2)
        value += shuffle_xor(value, mask);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp)
        sum += parts[warp];
    return sum;
}

// h in 16 bits.
SVDQ_DEVICE u32 pack_sum(float low, float high) {
    if (!T::kIsBf16) {
        low = low == low ? saturate<T>(low) : 0.f;
        high = high == high ? saturate<T>(high) : 0.f;
    }
    return T::pack(low, high);
}

// The first of a thread's columns in a piece.
SVDQ_DEVICE int column_of(int piece) {
    return 8 * (threadIdx.x + kThreads * piece);
}

// A thread's columns of a row.
struct Columns {
    u32 pair[kPieces][4];

    SVDQ_DEVICE Columns() = default;
    SVDQ_DEVICE Columns(const u16* row, int c) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int column = column_of(i);
            uint4 v = make_uint4(0, 0, 0, 0);
            if (column < c) v = *(const uint4*)(row + column);
            pair[i][0] = v.x, pair[i][1] = v.y, pair[i][2] = v.z, pair[i][3] = v.w;
        }
    }

    SVDQ_DEVICE void store(u16* row, int c) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int column = column_of(i);
            if (column < c)
                *(uint4*)(row + column) =
                    make_uint4(pair[i][0], pair[i][1], pair[i][2], pair[i][3]);
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) svdq_modulate(const Arguments p) {
    wait_for_kernel_before();
    let_next_kernel_start();
    const u64 at = (u64)blockIdx.x * p.c;
    const int image = blockIdx.x / p.rows;

    Columns h(p.x + at, p.c), y, gate, scale, shift;
    if constexpr (kGated) {
        y = Columns(p.y + at, p.c);
        gate = Columns(p.gate + (u64)image * p.gate_stride, p.c);
    }
    if constexpr (kNormed) {
        const u64 of_image = (u64)image * p.norm_stride;
        scale = Columns(p.scale + of_image, p.c);
        shift = Columns(p.shift + of_image, p.c);
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32& pair = h.pair[i][j];
            if constexpr (kGated) {
                const u32 g = gate.pair[i][j], v = y.pair[i][j];
                pair = pack_sum(fmaf(T::low(g), T::low(v), T::low(pair)),
                                fmaf(T::high(g), T::high(v), T::high(pair)));
            }
            sum += T::low(pair) + T::high(pair);
        }
    if constexpr (kGated) h.store(p.h + at, p.c);
    if constexpr (kNormed) {
        __shared__ float parts[2][kThreads / 32];
        const float mean = sum_of_block(sum, parts[0]) / p.c;
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            if (column_of(i) >= p.c) break;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float low = T::low(h.pair[i][j]) - mean, high = T::high(h.pair[i][j]) - mean;
                squares = fmaf(low, low, fmaf(high, high, squares));
            }
        }
        const float inverse = rsqrtf(sum_of_block(squares, parts[1]) / p.c + p.epsilon);
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32& pair = h.pair[i][j];
                const u32 s = scale.pair[i][j], t = shift.pair[i][j];
                const float low = (T::low(pair) - mean) * inverse;
                const float high = (T::high(pair) - mean) * inverse;
                pair = T::pack(saturate<T>(fmaf(low, 1.f + T::low(s), T::low(t))),
                               saturate<T>(fmaf(high, 1.f + T::high(s), T::high(t))));
            }
        h.store(p.z + at, p.c);
    }
}
