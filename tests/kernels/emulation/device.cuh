// csrc/device.cuh for a CPU: the same functions, by what they are said to do. A lane is a thread,
// and a warp's lanes meet wherever they do on a card. Asynchronous copies are made as late as they
// may be, so that a wait that is missing shows. Everything else of the kernels is compiled as it
// is.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

#define SVDQ_DEVICE inline
#define SVDQ_ARCH 890
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__

// ---- what CUDA brings ---------------------------------------------------------------------------

struct uint3 {
    u32 x, y, z;
};
struct uint2 {
    u32 x, y;
};
struct __align__(16) uint4 {
    u32 x, y, z, w;
};
struct int2 {
    int x, y;
};
struct float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) {
    return {x, y};
}
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) {
    return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
    return {x, y};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

extern thread_local uint3 threadIdx, blockIdx;
extern uint3 blockDim, gridDim;
extern u8 emulated_memory[];  // a block's dynamic shared memory

using std::fmaf;
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline u32 min(u32 a, u32 b) {
    return a < b ? a : b;
}
inline u32 min(u32 a, int b) {
    return min(a, (u32)b);
}
inline u32 min(int a, u32 b) {
    return min((u32)a, b);
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline u32 max(u32 a, u32 b) {
    return a > b ? a : b;
}
inline int __popc(u32 value) {
    return __builtin_popcount(value);
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline float rsqrtf(float x) {
    return 1.f / std::sqrt(x);
}
template <class Value>
Value __ldcg(const Value* from) {
    return *from;
}
inline u32 atomicAdd(u32* to, u32 value) {
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
inline void atomicAdd(float* to, float value) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&mutex);
    *to += value;
    pthread_mutex_unlock(&mutex);
}
inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// ---- lanes that meet ----------------------------------------------------------------------------

struct Warp {
    pthread_barrier_t barrier;
    u32 given[32][8];
};
extern Warp* emulated_warps;
extern pthread_barrier_t emulated_block;

inline u32 this_lane() {
    return threadIdx.x % 32;
}
inline void __syncwarp(u32 = 0) {
    pthread_barrier_wait(&emulated_warps[threadIdx.x / 32].barrier);
}
inline void __syncthreads() {
    pthread_barrier_wait(&emulated_block);
}

// Calls `use` with what all lanes have given.
template <int Count, class Use>
void exchange(const u32 (&mine)[Count], Use use) {
    u32(&given)[32][8] = emulated_warps[threadIdx.x / 32].given;
    std::copy(mine, mine + Count, given[this_lane()]);
    __syncwarp();
    use(given);
    __syncwarp();
}

template <class Value>
Value exchanged(Value value, u32 lane) {
    u32 bits[1];
    std::memcpy(bits, &value, 4);
    exchange(bits, [&](const u32(&given)[32][8]) { std::memcpy(&value, given[lane], 4); });
    return value;
}
template <class Value>
Value __shfl_xor_sync(u32, Value value, int mask) {
    return exchanged(value, this_lane() ^ mask);
}
template <class Value>
Value __shfl_sync(u32, Value value, int lane) {
    return exchanged(value, lane % 32);
}
inline bool __all_sync(u32, bool value) {
    const u32 mine[1] = {value};
    bool all = true;
    exchange(mine, [&](const u32(&given)[32][8]) {
        for (const u32(&each)[8] : given)
            all &= each[0] != 0;
    });
    return all;
}

// ---- device.cuh ---------------------------------------------------------------------------------

constexpr int kGroup = 64;
constexpr float kGeluShift = 0.171875f;
constexpr float kFloatMax = 3.402823466e38f;
constexpr float kFloatTiny = 1.175494351e-38f;

inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u32 as_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Bf16 {
    static constexpr bool kIsBf16 = true;
    static constexpr float kLargest = 3.3895313892515355e38f;

    static float low(u32 pair) {
        return as_float(pair << 16);
    }
    static float high(u32 pair) {
        return as_float(pair & 0xFFFF0000u);
    }
    static u32 rounded(float value) {
        const u32 bits = as_bits(value);
        return std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    static u32 pack(float low, float high) {
        return rounded(low) | rounded(high) << 16;
    }
};

struct Fp16 {
    static constexpr bool kIsBf16 = false;
    static constexpr float kLargest = 65504.f;

    static float value(u16 bits) {
        _Float16 half;
        std::memcpy(&half, &bits, 2);
        return (float)half;
    }
    static float low(u32 pair) {
        return value((u16)pair);
    }
    static float high(u32 pair) {
        return value((u16)(pair >> 16));
    }
    static u32 rounded(float value) {
        const _Float16 half = (_Float16)value;
        u16 bits;
        std::memcpy(&bits, &half, 2);
        return bits;
    }
    static u32 pack(float low, float high) {
        return rounded(low) | rounded(high) << 16;
    }
};

#if SVDQ_BF16
using T = Bf16;
#else
using T = Fp16;
#endif

template <class T>
float saturate(float value) {
    return std::fmin(std::fmax(value, -T::kLargest), T::kLargest);
}
inline float down_power(float largest) {
    const int exponent = 137 - (int)(as_bits(largest) >> 23);
    return as_float((u32)(max(min(exponent, 30), -100) + 127) << 23);
}
template <class T>
u32 pack_down(float low, float high) {
    constexpr float kMost = T::kIsBf16 ? 0x1p96f : T::kLargest;
    return T::pack(std::fmin(std::fmax(low, -kMost), kMost),
                   std::fmin(std::fmax(high, -kMost), kMost));
}

inline float reciprocal_estimate(float x) {
    return 1.f / x;
}
inline float reciprocal(float x) {
    return 1.f / x;
}
inline float gelu_tanh(float x) {
    return 0.5f * x * (1.f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
inline u32 low_bytes(const u32 (&words)[4]) {
    u32 result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (words[i] & 255) << 8 * i;
    return result;
}
inline u32 multiply_pairs(u32 a, u32 b) {
    return Fp16::pack(Fp16::low(a) * Fp16::low(b), Fp16::high(a) * Fp16::high(b));
}
inline float shuffle_xor(float value, int mask) {
    return exchanged(value, this_lane() ^ mask);
}
inline float quad_max(float value) {
    value = std::fmax(value, shuffle_xor(value, 1));
    return std::fmax(value, shuffle_xor(value, 2));
}
inline float quad_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
inline int read_thread_again() {
    return (int)threadIdx.x;
}

inline u32 shared_address(const void* pointer) {
    return (u32)((const u8*)pointer - emulated_memory);
}

using Copies = std::vector<std::function<void()>>;
extern thread_local std::vector<Copies> emulated_copies;  // groups, the last one not committed yet

template <int Bytes>
void copy_or_zero(u32 shared, const void* global, bool valid) {
    emulated_copies.back().push_back([=] {
        if (valid)
            std::memcpy(emulated_memory + shared, global, Bytes);
        else
            std::memset(emulated_memory + shared, 0, Bytes);
    });
}
inline void copy_commit() {
    emulated_copies.emplace_back();
}
template <int Pending>
void copy_wait() {
    while (emulated_copies.size() > Pending + 1) {
        for (const auto& copy : emulated_copies.front())
            copy();
        emulated_copies.erase(emulated_copies.begin());
    }
}

template <class Value>
Value loaded(u32 shared) {
    Value value;
    std::memcpy(&value, emulated_memory + shared, sizeof(Value));
    return value;
}
inline uint4 load_shared16(u32 shared) {
    return loaded<uint4>(shared);
}
inline uint2 load_shared8(u32 shared) {
    return loaded<uint2>(shared);
}
inline u32 load_shared4(u32 shared) {
    return loaded<u32>(shared);
}
inline uint4 load_global16_in_order(const void* from) {
    return *(const uint4*)from;
}
inline u32 load_shared1(u32 shared) {
    return loaded<u8>(shared);
}
inline void store_shared4(u32 shared, u32 value) {
    std::memcpy(emulated_memory + shared, &value, 4);
}
inline void store_shared8(u32 shared, u32 first, u32 second) {
    store_shared4(shared, first);
    store_shared4(shared + 4, second);
}
inline void store_shared16(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    store_shared8(shared, a, b);
    store_shared8(shared + 8, c, d);
}
inline void shared_add(u32 shared, int value) {
    __atomic_fetch_add((int*)(emulated_memory + shared), value, __ATOMIC_SEQ_CST);
}
inline void shared_maximum(u32 shared, u32 value) {
    u32* const to = (u32*)(emulated_memory + shared);
    u32 found = __atomic_load_n(to, __ATOMIC_SEQ_CST);
    while (found < value && !__atomic_compare_exchange_n(to, &found, value, false, __ATOMIC_SEQ_CST,
                                                         __ATOMIC_SEQ_CST)) {
    }
}

inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
inline void prefetch_line(const void*) {}

inline void load_matrices(u32 (&r)[4], u32 shared) {
    const u32 mine[1] = {shared}, lane = this_lane();
    exchange(mine, [&](const u32(&given)[32][8]) {
        for (u32 i = 0; i < 4; ++i)
            r[i] = load_shared4(given[8 * i + lane / 4][0] + lane % 4 * 4);
    });
}
inline void load_matrices_transposed(u32 (&r)[4], u32 shared) {
    const u32 mine[1] = {shared}, lane = this_lane();
    exchange(mine, [&](const u32(&given)[32][8]) {
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = 8 * i + lane % 4 * 2, column = lane / 4 * 2;
            r[i] = loaded<u16>(given[row][0] + column) |
                   (u32)loaded<u16>(given[row + 1][0] + column) << 16;
        }
    });
}

// A lane's four elements of a product of 16 rows and 8 columns, whose operands' registers hold
// `Each` elements along K: of a rows g and g + 8, then the same 4 Each columns on; of b likewise.
template <int Each, class Sum, class Left, class Right>
void multiply_fragments(Sum (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, Left left, Right right) {
    const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1}, lane = this_lane();
    exchange(mine, [&](const u32(&given)[32][8]) {
        for (u32 e = 0; e < 4; ++e) {
            const u32 row = lane / 4, column = lane % 4 * 2 + e % 2;
            for (u32 k = 0; k < 8 * Each; ++k) {
                const u32 quad = k / Each % 4, half = k / (4 * Each);
                sum[e] += left(given[row * 4 + quad][e / 2 + 2 * half], k % Each) *
                          right(given[column * 4 + quad][4 + half], k % Each);
            }
        }
    });
}
template <class T>
void mma_16bit(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const auto element = [](u32 pair, u32 i) -> double { return i ? T::high(pair) : T::low(pair); };
    double sum[4] = {acc[0], acc[1], acc[2], acc[3]};
    multiply_fragments<2>(sum, a, b0, b1, element, element);
    for (int e = 0; e < 4; ++e)
        acc[e] = (float)sum[e];
}
template <bool Unsigned>
void mma_4bit(u32 (&result)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 c) {
    const auto code = [](u32 word, u32 i) { return (int)(word << (28 - 4 * i)) >> 28; };
    int sum[4] = {(int)c, (int)c, (int)c, (int)c};
    multiply_fragments<8>(
        sum, a, b0, b1,
        [&](u32 word, u32 i) { return Unsigned ? (int)(word >> 4 * i & 15) : code(word, i); },
        code);
    std::copy(sum, sum + 4, result);
}
inline void mma_8bit(int (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const auto code = [](u32 word, u32 i) { return (int)(signed char)(word >> 8 * i); };
    multiply_fragments<4>(sum, a, b0, b1, code, code);
}
