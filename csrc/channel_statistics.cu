// Minimum, maximum and sum of squares of every channel (column) of x (M, K), taken into those of
// earlier inputs, and copies of a few of its rows: what calibration watches, with one pass over x.
//
//                  256 columns
//                +---------------+--- . .     A block has a slice of the rows and 256 columns: a
//     a slice    | warp 0, 8, .. |            warp reads whole lines of 512 bytes, a lane eight
//     of the     | warp 1, 9, .. |            columns each. What the warps found is put together
//     rows       |  .  .  .      |            in shared memory, one column a thread; what the
//                +---------------+--- . .     slices found, by the block of these columns that
//                |               |            finishes last, in order: the same bits every time.
//
// A NaN in x makes the sum of its column's squares NaN for good, and with it the extremes, which
// would forget it. Infinities need no such help.
#include "device.cuh"

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kColumns = 256;
constexpr int kAhead = 8;  // rows whose loads are on their way at once
constexpr int kMostChosen = 512;
constexpr int kMinimum = 0, kMaximum = 1, kSquares = 2, kKinds = 3;

struct Arguments {
    const u16* x;        // (M, K), K a multiple of 8
    float* minimum;      // (K,)
    float* maximum;      // (K,)
    double* square_sum;  // (K,)
    float* partial;      // (kKinds, slices, K)
    u32* counters;       // zero, one for each 256 columns
    u16* copies;         // (count, K)
    int m, k, slice_rows, count;
    int chosen[kMostChosen];  // rows to copy; here, to need no copy of their own
};

// One channel's three numbers.
struct Found {
    float minimum = __int_as_float(0x7F800000), maximum = __int_as_float((int)0xFF800000u),
          squares = 0.f;

    SVDQ_DEVICE void take(float value) {
        minimum = fminf(minimum, value);
        maximum = fmaxf(maximum, value);
        squares = fmaf(value, value, squares);
    }
    SVDQ_DEVICE void take(const Found& other) {
        minimum = fminf(minimum, other.minimum);
        maximum = fmaxf(maximum, other.maximum);
        squares += other.squares;
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) svdq_channel_statistics(const Arguments p) {
    __shared__ __align__(16) float by_warp[kKinds][kWarps][kColumns];
    __shared__ u32 finished;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.y * p.slice_rows, last = min(first + p.slice_rows, p.m);
    const int eight = blockIdx.x * kColumns + lane * 8,
              column = blockIdx.x * kColumns + threadIdx.x;
    wait_for_kernel_before();

    Found mine[8];
    const auto take = [&](const uint4& v) {
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            mine[2 * i].take(T::low(pairs[i]));
            mine[2 * i + 1].take(T::high(pairs[i]));
        }
    };
    if (eight < p.k) {
        const u16* x = p.x + eight;
        for (int row = first + warp; row < last; row += kAhead * kWarps) {
            uint4 v[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                if (row + i * kWarps < last)
                    v[i] = load_global16_in_order(x + (u64)(row + i * kWarps) * p.k);
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                if (row + i * kWarps < last) take(v[i]);
        }
        for (int i = warp; i < p.count; i += kWarps) {
            const int from = p.chosen[i];
            if (first <= from && from < last)
                *(uint4*)(p.copies + (u64)i * p.k + eight) =
                    load_global16_in_order(x + (u64)from * p.k);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        by_warp[kMinimum][warp][lane * 8 + i] = mine[i].minimum;
        by_warp[kMaximum][warp][lane * 8 + i] = mine[i].maximum;
        by_warp[kSquares][warp][lane * 8 + i] = mine[i].squares;
    }
    __syncthreads();

    const u64 kind = (u64)gridDim.y * p.k;
    if (column < p.k) {
        Found block;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            Found other;
            other.minimum = by_warp[kMinimum][w][threadIdx.x];
            other.maximum = by_warp[kMaximum][w][threadIdx.x];
            other.squares = by_warp[kSquares][w][threadIdx.x];
            block.take(other);
        }
        float* to = p.partial + (u64)blockIdx.y * p.k + column;
        to[kMinimum * kind] = block.minimum;
        to[kMaximum * kind] = block.maximum;
        to[kSquares * kind] = block.squares;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        finished = atomicAdd(p.counters + blockIdx.x, 1u);
        if (finished == gridDim.y - 1) p.counters[blockIdx.x] = 0;  // as the next launch needs it
    }
    __syncthreads();
    if (finished != gridDim.y - 1 || column >= p.k) return;

    __threadfence();
    float minimum = p.minimum[column], maximum = p.maximum[column];
    double squares = p.square_sum[column];
#pragma unroll 16  // many loads on their way at once
    for (u32 slice = 0; slice < gridDim.y; ++slice) {
        const float* from = p.partial + (u64)slice * p.k + column;
        minimum = fminf(minimum, __ldcg(from + kMinimum * kind));
        maximum = fmaxf(maximum, __ldcg(from + kMaximum * kind));
        squares += (double)__ldcg(from + kSquares * kind);
    }
    const bool clean = squares == squares;
    p.minimum[column] = clean ? minimum : (float)squares;
    p.maximum[column] = clean ? maximum : (float)squares;
    p.square_sum[column] = squares;
}
