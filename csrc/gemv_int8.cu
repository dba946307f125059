// y = Q(x / smooth_factor) . W^T + bias for at most eight rows of x, W and Q(x) in 8 bits with one
// scale a row (SVDQuant, table 1). For modulation layers, whose input is one row an image: reading
// W is all the work, and as in gemv_awq.cu layers of one input are taken together.
//
//     y[m, n] = act_scale[m] * weight_scale[n] * (sum of codes) + bias[n]
//
// Tensor cores make the products, with W on the left: its 16 x 32 fragments meet 32 x 8 of the
// codes of x^T. What a lane reads of W's rows is a fragment as it is.
//
//                     K
//                warp 0 | warp 1 | ...    A block has tiles of 16 outputs next to each other,
//     tile        256   |  256   |        which mostly belong to one layer, sometimes to the next,
//     tile + 1   columns|        |        too. For each of these its warps make codes of their
//     ...               |        |        columns of x, and keep them in registers; then a warp
//                                         runs alone through a batch of tiles, with copies
//                                         STAGES - 1 tiles ahead, and adds its sums to the block's.
//
//     shared memory:   stages [warp][STAGES][16 rows][256]  |  sums [tile][row of x][16]
//                      |  largest of each row of x [8]
//                      16 bytes c of row r at c ^ (4 * (r % 2))
//
// Sums are integers, so the order in which warps add them is of no account. A batch has as many
// tiles as a thread for each pair of outputs allows: their scales and biases are read before it.
//
// A launch may begin while the kernel in front of it ends (Launcher.launch, `early`); what may be
// done before the wait, and why the next is let start behind it, is told in gemv_awq.cu.
//
// Fragments: g = lane / 4, q = lane % 4. Rows g and g + 8 of W and row g of x; of 64 columns a lane
// has 16q .. 16q + 15 of each, four words, of which a product takes two.
#include "gemv.cuh"

namespace {

constexpr int kColumns = 256, kMostM = 8;  // of a warp's tile; rows of x
constexpr int kGroups = kColumns / 64;
constexpr int kStageBytes = kRows * kColumns;
constexpr u32 kOther = kStages > 1 ? kStageBytes : 0;  // from one stage to the other
constexpr float kLargestCode = 127.f;

struct Layer {
    const u16* smooth_factor;   // (K,)
    const u8* weight;           // (N, K)
    const float* weight_scale;  // (N,)
    const u16* bias;            // (N,) or null
    int n;
    int before;  // outputs of the layers before it
};

// Of a row, a lane's columns: 16 of each 64.
struct Columns {
    uint4 part[kGroups][2];

    SVDQ_DEVICE void read(const u16* row, int column, int k) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i, column += 64)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                part[i][half] =
                    column < k ? ((const uint4*)(row + column))[half] : make_uint4(0, 0, 0, 0);
    }

    SVDQ_DEVICE void unpack(float (&values)[16], int i) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 v = part[i][half];
            const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                values[half * 8 + 2 * j] = T::low(pairs[j]);
                values[half * 8 + 2 * j + 1] = T::high(pairs[j]);
            }
        }
    }
};

// Four values to codes. Adding 12582912 rounds to an integer in a float's low bits.
SVDQ_DEVICE u32 encode(const float* values, float inverse_scale) {
    u32 bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        bits[j] = as_bits(fminf(fmaxf(values[j] * inverse_scale, -kLargestCode), kLargestCode) +
                          12582912.f);
    return low_bytes(bits);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SVDQ_WARPS * 32, 1)
    svdq_gemv_int8(const Arguments<Layer> p) {
    extern __shared__ __align__(256) u8 shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
              q = lane % 4;
    const int warps = blockDim.x / 32, first_column = warp * kColumns;

    const int block = blockIdx.x;
    int left = p.tiles + (block < p.longer ? 1 : 0);
    Place place = {0, (block * p.tiles + min(block, p.longer)) * kRows};
    place.settle(p);

    // Of the first tile what this warp will copy: two lines of each row.
    if (kEarly) {
        const int column = first_column + lane % 2 * 128;
        if (column < p.k)
            prefetch_line(p.layers[place.layer].weight + (u32)(place.first(p) + lane / 2) * p.k +
                          column);
    }
    wait_for_kernel_before();
    let_next_kernel_start();

    // x and smoothing factors come first: behind the copies of W they would wait for all of them.
    // In place of rows that x does not have others are read: their sums are not used.
    Columns x, smooth;
    auto read_x = [&]() {
        const int column = first_column + q * 16;
        x.read(p.x + (u32)min(g, p.m - 1) * p.k, column, p.k);
        smooth.read(p.layers[place.layer].smooth_factor, column, p.k);
    };
    read_x();
    __syncwarp();  // the compiler would put copies first

    // Copies: a lane's 16 bytes of every other row.
    const u32 stages = shared_address(shared) + warp * kStages * kStageBytes;
    const u32 copy_row = lane / 16, copy_column = first_column + lane % 16 * 16;
    u32 to = stages + copy_row * kColumns + ((lane % 16 ^ copy_row * 4) << 4), copy_slot = 0;
    Place copy_place = place;
    int copy_left = left;
    auto copy_tile = [&]() {
        if (copy_left) {
            --copy_left;
            copy_place.settle(p);
            const u8* const from = p.layers[copy_place.layer].weight +
                                   (u32)(copy_place.first(p) + copy_row) * p.k + copy_column;
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i)
                copy_or_zero<16>(to + copy_slot + i * 2 * kColumns, from + (u32)i * 2 * p.k,
                                 copy_column < p.k);
            copy_place.n += kRows;
            copy_slot ^= kOther;
        }
        copy_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s)
        copy_tile();

    const u32 sums = shared_address(shared) + warps * kStages * kStageBytes;
    const u32 largest = sums + p.batch * p.m * kRows * 4;
    for (int i = thread; i < p.batch * p.m * kRows; i += warps * 32)
        store_shared4(sums + i * 4, 0);

    const u32 fragment = stages + g * kColumns + ((q ^ g % 2 * 4) << 4);
    u32 slot = 0;
    for (;;) {
        // ---- a layer's codes of x
        u32 codes[kGroups][4];
        {
            float values[kGroups][16], top = 0.f;
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                float divisors[16];
                x.unpack(values[i], i);
                smooth.unpack(divisors, i);
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    // What overflows is as large as can be; where K has ended all codes are zero.
                    const float value = values[i][j] * reciprocal(divisors[j]);
                    values[i][j] = first_column + i * 64 < p.k
                                       ? fminf(fmaxf(value, -kFloatMax), kFloatMax)
                                       : 0.f;
                    top = fmaxf(top, fabsf(values[i][j]));
                }
            }
            if (thread < kMostM) store_shared4(largest + thread * 4, 0);
            __syncthreads();
            shared_maximum(largest + g * 4, as_bits(top));
            __syncthreads();
            top = as_float(load_shared4(largest + g * 4));
            // Below this the reciprocal overflows; such a row is zero for all purposes.
            const float inverse =
                top > kFloatTiny * kLargestCode ? __fdiv_rn(kLargestCode, top) : 0.f;
#pragma unroll
            for (int i = 0; i < kGroups; ++i)
#pragma unroll
                for (int word = 0; word < 4; ++word)
                    codes[i][word] = encode(values[i] + word * 4, inverse);
        }

        // ---- its outputs, as far as they are this block's
        const Layer& layer = p.layers[place.layer];
        int of_layer = min(left, (layer.n - place.n + kRows - 1) / kRows);
        left -= of_layer;
        while (of_layer) {
            const int count = min(p.batch, of_layer);
            of_layer -= count;
            // After the batch a thread finishes two outputs of each row of x.
            const bool finishes = thread < count * (kRows / 2);
            const Place mine = {place.layer, place.n + thread / (kRows / 2) * kRows};
            const int n = mine.first(p) + thread % (kRows / 2) * 2;
            float2 scale = make_float2(0.f, 0.f);
            u32 bias = 0;
            if (finishes) {
                scale = *(const float2*)(layer.weight_scale + n);
                if (layer.bias) bias = *(const u32*)(layer.bias + n);
            }
            for (int tile = 0; tile < count; ++tile) {
                copy_tile();
                copy_wait<kStages - 1>();
                __syncwarp();
                int acc[4] = {};
#pragma unroll
                for (int i = 0; i < kGroups; ++i) {
                    const uint4 upper = load_shared16((fragment ^ i * 64) + slot);
                    const uint4 lower = load_shared16((fragment ^ i * 64) + slot + 8 * kColumns);
                    const u32 even[4] = {upper.x, lower.x, upper.y, lower.y};
                    const u32 odd[4] = {upper.z, lower.z, upper.w, lower.w};
                    mma_8bit(acc, even, codes[i][0], codes[i][1]);
                    mma_8bit(acc, odd, codes[i][2], codes[i][3]);
                }
                slot ^= kOther;
                const u32 at = sums + ((tile * p.m + 2 * q) * kRows + g) * 4;
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (2 * q + h < p.m) {
                        shared_add(at + h * kRows * 4, acc[h]);
                        shared_add(at + h * kRows * 4 + 32, acc[2 + h]);
                    }
                __syncwarp();
            }
            __syncthreads();
            if (finishes) {
                u32 at = sums + (thread / (kRows / 2) * p.m * kRows + thread % (kRows / 2) * 2) * 4;
                u16* to = p.out + (u32)layer.before * p.m + n;
#pragma unroll 1
                for (int m = 0; m < p.m; ++m, at += kRows * 4, to += layer.n) {
                    const uint2 sum = load_shared8(at);
                    store_shared8(at, 0, 0);
                    const float act_scale =
                        __fdiv_rn(as_float(load_shared4(largest + m * 4)), kLargestCode);
                    // Not infinite, or a bias could make it NaN.
                    const float y0 = saturate<Bf16>((float)(int)sum.x * scale.x * act_scale);
                    const float y1 = saturate<Bf16>((float)(int)sum.y * scale.y * act_scale);
                    *(u32*)to =
                        T::pack(saturate<T>(y0 + T::low(bias)), saturate<T>(y1 + T::high(bias)));
                }
            }
            __syncthreads();
            place.n += count * kRows;
        }
        if (left == 0) break;
        place.settle(p);
        read_x();
    }
}
