// y = x . W^T + bias for at most eight rows of x, W = (code - 8) * scale + zero in groups of 64
// columns. For modulation layers, whose input is one row an image: reading W is all the work.
// Layers of one input are taken together: a launch's start and end cost as much as a layer of
// FLUX.1.
//
// Tensor cores make the products, with W on the left: its 16 x 16 fragments meet 16 x 8 of x^T, so
// eight rows of x cost what one does. Codes plus an offset are exact in 16 bits; a group's sums,
// and those of x alone, are float32 and are scaled when the group ends (24 is the offset and the
// codes' centre):
//
//     y[n] += scale[g, n] * (sum of (code + 16) * x) + (zero[g, n] - 24 * scale[g, n]) * (sum of x)
//
//                     K
//                warp 0 | warp 1 | ...    Block b has the tiles of 16 outputs b, b + blocks and so
//     tile b      256   |  256   |        on, through all layers: the card reads them from their
//     b + blocks        |        |        beginning to their end. A warp has four groups of K, and
//     b + 2 blocks      |        |        x of them in registers. It runs alone, with copies
//     ...               |        |        STAGES - 1 tiles ahead, and keeps its sums; the block
//                                         adds them up for a batch of tiles, as many as shared
//                                         memory has room for.
//
// Where the warps of a block cannot cover K, they go through a batch again with other groups. Where
// N is an odd number of eights, a layer's last tile begins eight early. The warps take turns to
// note what a tile's end needs to know, those of the next batch beside those of this one.
//
//     shared memory:   stages [warp]  |  notes [2][tile]  |  sums [tile][warp][row of x][16]
//     a note:          bias [16]  |  where the outputs go  |  N
//     a warp's stages: codes [8][STAGES][2 rows of 128 bytes]  |  [STAGES][scales, zeros][4][16]
//                      chunk c of row r at c ^ (2 * (r / 2 % 4)), the other stage at address ^ 256
//
// A launch may begin while the kernel in front of it ends (Launcher.launch, `early`). Nothing may
// be read before the wait: that kernel may be what writes x, or a weight (made or uploaded just
// before), and even one that never lets the next start does so when its blocks have ended, ahead of
// its writes being visible. So until then W is only fetched into the second-level cache, where a
// later write changes it like any other. Behind the wait all earlier kernels have ended, and only
// then is the next let start: whoever waits for ours has waited for all before.
//
// Row g of a fragment is output 2g, row g + 8 output 2g + 1 (g = lane / 4, q = lane % 4), so a
// lane's two scales are a word. In a group lane q has columns 16q .. 16q + 15; nibbles j and j + 4
// of a word of codes are a pair of a product's operand, and x is paired alike.
#include "gemv.cuh"

namespace {

constexpr int kGroups = 4;  // of a stage
constexpr int kRowBytes = kGroups * kGroup / 2;
constexpr int kCodes = kRows * kRowBytes, kScales = kRows * kGroups * 2;
constexpr int kStageBytes = kCodes + 2 * kScales;
constexpr int kPairBytes = kStages * 2 * kRowBytes;            // of two rows, in all stages
constexpr int kNote = 2 * kRows + 16, kNoteWhere = 2 * kRows;  // bytes
constexpr u32 kOther = kStages > 1 ? 2 * kRowBytes : 0;        // to the other stage
static_assert(2 * kScales == 2 * kRowBytes);

struct Layer {
    const u8* weight;  // (N, K / 2)
    const u16* scale;  // (K / 64, N)
    const u16* zero;   // (K / 64, N)
    const u16* bias;   // (N,) or null
    int n;
    int before;  // outputs of the layers before it
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

// The same, paired as codes are; and sums of two rows of x.
struct Operand {
    u32 pair[8];
    float sum[2];

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
        for (int e = 0; e < 2; ++e)
            sum[e] = sums[e];
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(SVDQ_WARPS * 32, 1)
    svdq_gemv_awq(const Arguments<Layer> p) {
    extern __shared__ __align__(512) u8 shared[];
    const u32 lane = kept(threadIdx.x % 32);
    const int warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int warps = blockDim.x / 32, groups = p.k / kGroup;

    const int block = blockIdx.x, tiles = p.tiles + (block < p.longer ? 1 : 0);
    const int step_n = gridDim.x * kRows;
    const u32 row_bytes = p.k / 2;
    Place copy_place = {0, block * kRows};
    copy_place.settle(p);

    // Of the first tile what this warp will copy: 128 bytes of each row, each group's scales and
    // zeros.
    const int group = warp * kGroups;
    if (kEarly && group < groups) {
        const Layer& layer = p.layers[copy_place.layer];
        const u32 n = copy_place.first(p);
        if (lane < kRows)
            prefetch_line(layer.weight + ((n + lane) * row_bytes + group * (kGroup / 2)));
        else if (lane < kRows + 2 * kGroups)
            prefetch_line((lane % 8 < 4 ? layer.scale : layer.zero) +
                          (min(group + lane % 4, groups - 1) * layer.n + n));
    }
    wait_for_kernel_before();
    let_next_kernel_start();

    // x comes first: behind the copies of W it would wait for all of them. In place of rows and
    // groups that x does not have others are read: their sums are not used.
    Columns columns[kGroups];
    auto read_x = [&](int round) {
        const int thread = read_thread_again(), group = (round * warps + thread / 32) * kGroups;
        const u16* const row = p.x + (u32)min(thread % 32 / 4, p.m - 1) * p.k + thread % 4 * 16;
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            columns[i].read(row + min(group + i, groups - 1) * kGroup);
    };
    read_x(0);
    __syncwarp();  // the compiler would put some copies first

    // Copies: 16 bytes of rows lane / 8 + 4i, and with 16 of the lanes those of the same groups'
    // scales and zeros. They go through the tiles in the order in which these are multiplied.
    const u32 stages = shared_address(shared + warp * kStages * kStageBytes);
    const u32 row = lane / 8, chunk = lane % 8;
    u32 to =
        kept(stages + row / 2 * kPairBytes + row % 2 * kRowBytes + ((chunk ^ row / 2 * 2) << 4));
    u32 scale_to = kept(stages + kStages * kCodes + lane * 16);
    const u32 notes = shared_address(shared + warps * kStages * kStageBytes);
    Place copy_first = copy_place;
    int turn = warp, copy_notes = 0;  // tiles until this warp's turn; notes of the other batch
    const int first_group = warp * kGroups + lane % 8 / 2;
    int copy_group = first_group, copy_tile = 0, copy_count = min(p.batch, tiles),
        copy_left = tiles, copy_round = 0;
    auto copy_stage = [&]() {
        if (copy_count) {
            copy_place.settle(p);
            const Layer& layer = p.layers[copy_place.layer];
            const u32 n = copy_place.first(p);
            const u32 group = min(copy_group, groups - 1), half = lane % 2 * 16;
            const u8* const codes =
                layer.weight + ((n + row) * row_bytes + group * (kGroup / 2) + half);
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i)
                copy_or_zero<16>((i % 2 ? to ^ 64 : to) + i * 2 * kPairBytes,
                                 codes + i * 4 * row_bytes, true);
            // Where K has ended, scales of zero keep out what is read.
            if (lane < 16)
                copy_or_zero<16>(scale_to,
                                 (const u8*)(lane < 8 ? layer.scale : layer.zero) +
                                     ((group * layer.n + n) * 2 + half),
                                 copy_group < groups);
            to ^= kOther, scale_to ^= kOther;
            if (turn-- == 0) {
                turn = warps - 1;
                const u32 note = notes + (copy_notes + copy_tile) * kNote;
                if (lane < 2)
                    copy_or_zero<16>(note + half, (const u8*)layer.bias + (n * 2 + half),
                                     layer.bias != nullptr);
                if (lane == 0)
                    store_shared8(note + kNoteWhere, (u32)layer.before * p.m + n, layer.n);
            }
            copy_place.n += step_n;
            if (++copy_tile == copy_count) {
                copy_tile = 0;
                copy_group += warps * kGroups;
                if (++copy_round < p.rounds) {
                    copy_place = copy_first;
                } else {
                    copy_round = 0, copy_first = copy_place, copy_group = first_group;
                    copy_notes = p.batch - copy_notes;
                    copy_left -= copy_count, copy_count = min(p.batch, copy_left);
                }
            }
        }
        copy_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s)
        copy_stage();

    u32 codes_at = kept(stages + g * kPairBytes + g % 4 * 32 + q * 8);
    u32 scales_at = kept(stages + kStages * kCodes + g * 4);
    // A lane is less than 32. Of a mere constant the compiler would make a register for every word.
    const u32 mask = kept(lane & 32 ? 0 : kMask);
    float* const sums = (float*)(shared + warps * kStages * kStageBytes + 2 * p.batch * kNote);
    const u32 sums_stride = warps * p.m * kRows * 4;
    const u32 sums_start = kept(shared_address(sums + (warp * p.m + 2 * q) * kRows + 2 * g));
    u32 batch_notes = notes;
    for (int first = 0; first < tiles; first += p.batch) {
        const int count = min(p.batch, tiles - first);
        for (int round = 0; round < p.rounds; ++round) {
            Operand x[kGroups];
#pragma unroll
            for (int i = 0; i < kGroups; ++i)
                x[i].take(columns[i]);
            u32 sums_at = sums_start;
            for (int tile = 0; tile < count; ++tile, sums_at += sums_stride) {
                copy_stage();
                copy_wait<kStages - 1>();
                __syncwarp();
                float acc[4] = {};
#pragma unroll
                for (int i = 0; i < kGroups; ++i) {
                    const uint2 even = load_shared8(codes_at ^ i * 32);
                    const uint2 odd = load_shared8((codes_at ^ i * 32) + kRowBytes);
                    const u32 scale = load_shared4(scales_at + i * kRows * 2);
                    const u32 zero = load_shared4(scales_at + kScales + i * kRows * 2);
                    float products[4] = {};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const u32 word[2] = {half ? even.y : even.x, half ? odd.y : odd.x};
                        const u32 low[4] = {decode<0>(word[0], mask), decode<0>(word[1], mask),
                                            decode<1>(word[0], mask), decode<1>(word[1], mask)};
                        const u32 high[4] = {decode<2>(word[0], mask), decode<2>(word[1], mask),
                                             decode<3>(word[0], mask), decode<3>(word[1], mask)};
                        mma_16bit<T>(products, low, x[i].pair[4 * half], x[i].pair[4 * half + 1]);
                        mma_16bit<T>(products, high, x[i].pair[4 * half + 2],
                                     x[i].pair[4 * half + 3]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float s = e < 2 ? T::low(scale) : T::high(scale);
                        const float z = e < 2 ? T::low(zero) : T::high(zero);
                        acc[e] = fmaf(s, products[e],
                                      fmaf(fmaf(-kOffset, s, z), x[i].sum[e % 2], acc[e]));
                    }
                }
                codes_at ^= kOther, scales_at ^= kOther;
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
            read_x(round + 1 < p.rounds ? round + 1 : 0);
        }

        __syncthreads();
        // A thread adds up four outputs of a row of x. A tile's rows are counted as a power of two.
        const int log_m = p.m > 4 ? 3 : p.m > 2 ? 2 : p.m - 1;
        for (int i = read_thread_again(); i < count * 4 << log_m; i += warps * 32) {
            const int column = i % 4 * 4, m = i / 4 & (1 << log_m) - 1, tile = i / 4 >> log_m;
            if (m >= p.m) continue;
            const u32 note = batch_notes + tile * kNote;
            const uint2 bias = load_shared8(note + column * 2);
            const uint2 where = load_shared8(note + kNoteWhere);
            float y[4] = {T::low(bias.x), T::high(bias.x), T::low(bias.y), T::high(bias.y)};
            const float4* from = (const float4*)(sums + (tile * warps * p.m + m) * kRows + column);
#pragma unroll 4
            for (int w = 0; w < warps; ++w) {
                const float4 v = from[w * p.m * (kRows / 4)];
                y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
            }
            *(uint2*)(p.out + (where.x + m * where.y + column)) =
                make_uint2(T::pack(saturate<T>(y[0]), saturate<T>(y[1])),
                           T::pack(saturate<T>(y[2]), saturate<T>(y[3])));
        }
        batch_notes = 2 * notes + p.batch * kNote - batch_notes;
        __syncthreads();
    }
}
