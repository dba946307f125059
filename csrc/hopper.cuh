// What only sm_90a has: barriers that count bytes, bulk copies between global and shared memory,
// and matrix products of a whole warpgroup.
#pragma once

#include "device.cuh"

// ---- barriers in shared memory ------------------------------------------------------------------

SVDQ_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// One arrival, and a promise of so many bytes from copies.
SVDQ_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

SVDQ_DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

SVDQ_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
        "@!done bra WAIT; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Makes the barriers' first state visible to copies.
SVDQ_DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A barrier for some whole warps of a block, by its number, which is not 0.
SVDQ_DEVICE void warps_sync(u32 barrier, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// The same for the 128 threads of one of a block's consumer warpgroups.
SVDQ_DEVICE void warpgroup_sync(u32 index) {
    warps_sync(index + 1, 128);
}

// ---- bulk copies --------------------------------------------------------------------------------

// Contiguous bytes (a multiple of 16) to shared memory, counted by a barrier.
SVDQ_DEVICE void bulk_load(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// Where someone is in a sequence of uses of a ring of slots: at which, and how often it came round.
template <u32 Slots>
struct Ring {
    u32 slot = 0, parity = 0;

    SVDQ_DEVICE void advance() {
        if (++slot == Slots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// How the clusters of a launch take tiles in turn, of two consumers' rows each. Those that a last
// round would leave most clusters without can be dealt out as halves, of one consumer's rows:
//
//     turn     0 ..   whole   + 1   + 2   + 3
//     tile     0 ..   whole       | whole + 1       the upper half of a tile, then the lower one
struct Turns {
    int whole, all;

    SVDQ_DEVICE Turns(int tiles, int whole) : whole(whole), all(2 * tiles - whole) {}
    SVDQ_DEVICE bool half(int turn) const {
        return turn >= whole;
    }
    SVDQ_DEVICE int tile(int turn) const {
        return half(turn) ? whole + (turn - whole) / 2 : turn;
    }
    // Rows of the tile that come before those of this turn.
    SVDQ_DEVICE int skipped(int turn) const {
        return half(turn) ? (turn - whole) % 2 * 64 : 0;
    }
};

// Of an output, as a cluster takes them: a tile of columns, and two of rows above each other.
template <u32 Blocks, int Rows, int Columns>
struct PairedTiles {
    int pairs;
    Turns turns;

    SVDQ_DEVICE PairedTiles(int m, int n, int whole)
        : pairs((m + Blocks * Rows - 1) / (Blocks * Rows)),
          turns(pairs * ((n + Columns - 1) / Columns), whole) {}
    SVDQ_DEVICE int row(int turn) const {
        const int pair = turns.tile(turn) % pairs;
        return (pair * Blocks + blockIdx.x % Blocks) * Rows + turns.skipped(turn);
    }
    SVDQ_DEVICE int column(int turn) const {
        return turns.tile(turn) / pairs * Columns;
    }
};

// ---- tensors, described by the host (cuTensorMapEncodeTiled) ------------------------------------

struct alignas(64) TensorMap {
    u64 opaque[16];
};

// The box at (x, y), x in bytes along the rows, to shared memory; beyond the tensor's edges it is
// zero.
SVDQ_DEVICE void tensor_load(u32 shared, const TensorMap& map, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// The same of three dimensions, x in elements.
SVDQ_DEVICE void tensor_load_3d(u32 shared, const TensorMap& map, int x, int y, int z,
                                u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// As tensor_load, for all blocks of the cluster: to the same place in each, counted by each one's
// barrier.
template <u32 Blocks>
SVDQ_DEVICE void tensor_load_shared_by(u32 shared, const TensorMap& map, int x, int y,
                                       u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"((u16)((1u << Blocks) - 1))
        : "memory");
}

// Shared memory to the box at (x, y); what lies beyond the tensor's edges is left out.
SVDQ_DEVICE void tensor_store(const TensorMap& map, int x, int y, u32 shared) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
        "r"(x), "r"(y), "r"(shared)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most `Pending` stores of this thread still read shared memory.
template <int Pending>
SVDQ_DEVICE void tensor_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Makes what this thread wrote to shared memory visible to copies.
SVDQ_DEVICE void fence_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- clusters -----------------------------------------------------------------------------------

SVDQ_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// Arrive at the same barrier of another block of the cluster. Scope is the block's on purpose: the
// cluster's would flush to global memory first.
SVDQ_DEVICE void barrier_arrive_at(u32 barrier, u32 block) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
        "r"(block)
        : "memory");
}

// The cluster's barrier in two parts; orders nothing but what fence_barrier_init() does.
SVDQ_DEVICE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
SVDQ_DEVICE void cluster_wait() {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// 16 bytes to the same place of another block's shared memory, counted by its barrier.
SVDQ_DEVICE void store_shared16_at(u32 shared, uint4 v, u32 barrier, u32 block) {
    asm volatile(
        "{ .reg .b32 there, counter;"
        "mapa.shared::cluster.u32 there, %0, %6; mapa.shared::cluster.u32 counter, %5, %6;"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%1, %2, %3, %4},"
        " [counter]; }" ::"r"(shared),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier), "r"(block)
        : "memory");
}

// The same for 8 bytes.
SVDQ_DEVICE void store_shared8_at(u32 shared, u32 first, u32 second, u32 barrier, u32 block) {
    asm volatile(
        "{ .reg .b32 there, counter;"
        "mapa.shared::cluster.u32 there, %0, %4; mapa.shared::cluster.u32 counter, %3, %4;"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {%1, %2},"
        " [counter]; }" ::"r"(shared),
        "r"(first), "r"(second), "r"(barrier), "r"(block)
        : "memory");
}

// ---- register allotment -------------------------------------------------------------------------

template <int Count>
SVDQ_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
SVDQ_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- warpgroup products -------------------------------------------------------------------------

// An operand in shared memory: rows of 128 bytes along K, 16-byte chunk c of row r at c ^ (r % 8),
// eight rows after one another in each 1024 bytes. 32 bytes further along K: add 2.
SVDQ_DEVICE u64 operand(u32 shared) {
    constexpr u64 kSwizzle128 = 1ull << 62, kEightRows = (u64)(1024 >> 4) << 32,
                  kUnused = 1ull << 16;
    return kSwizzle128 | kEightRows | kUnused | (shared >> 4);
}

SVDQ_DEVICE void products_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SVDQ_DEVICE void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
SVDQ_DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#define SVDQ_NAMES40                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39"
#define SVDQ_8(con, i)                                                                    \
    con(r[i]), con(r[i + 1]), con(r[i + 2]), con(r[i + 3]), con(r[i + 4]), con(r[i + 5]), \
        con(r[i + 6]), con(r[i + 7])
#define SVDQ_16(con, i) SVDQ_8(con, i), SVDQ_8(con, i + 8)
#define SVDQ_32(con, i) SVDQ_16(con, i), SVDQ_16(con, i + 16)
#define SVDQ_64(con, i) SVDQ_32(con, i), SVDQ_32(con, i + 32)

// r (64 x 160, pairs of fp16) = a (64 x 32, E4M3) b (160 x 32, E4M3)^T + (keep ? r : 0).
// Register 2 j + h of lane l in warp w: row 16 w + l / 4 + 8 h, columns 8 j + 2 (l % 4) and + 1.
SVDQ_DEVICE void multiply_fp8(u32 (&r)[40], u64 a, u64 b, bool keep) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %42, 0;"
        "wgmma.mma_async.sync.aligned.m64n160k32.f16.e4m3.e4m3 {" SVDQ_NAMES40
        "}, %40, %41, p, 1, 1; }"
        : SVDQ_32("+r", 0), SVDQ_8("+r", 32)
        : "l"(a), "l"(b), "r"((int)keep));
}

// Products of 32 to 256 columns, which come from shared memory; how many is told by the sums that
// they are given, half as many for each thread. Registers 4 j + 2 h and + 1 of lane l in warp w are
// row 16 w + l / 4 + 8 h, columns 8 j + 2 (l % 4) and + 1: the first columns' sums are a product of
// their own.
//
//   multiply_int8    r = a b^T + (keep ? r : 0)   a (64 x 32), b (columns x 32): int8
//   multiply_16bit   r += a b^T                   a (64 x 16), b (columns x 16): 16 bits
//   multiply_16bit   r = a b^T + (keep ? r : 0)   the same, a in registers
#define SVDQ_NAMES_16                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, " \
    "%15"
#define SVDQ_NAMES_24 \
    SVDQ_NAMES_16     \
    ", "              \
    "%16, %17, %18, %19, %20, %21, %22, %23"
#define SVDQ_NAMES_32 \
    SVDQ_NAMES_24     \
    ", "              \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SVDQ_NAMES_48                                                   \
    SVDQ_NAMES_32                                                       \
    ", "                                                                \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
    "%45, %46, %47"
#define SVDQ_NAMES_64                                                   \
    SVDQ_NAMES_48                                                       \
    ", "                                                                \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
    "%61, %62, %63"
#define SVDQ_NAMES_80                                                   \
    SVDQ_NAMES_64                                                       \
    ", "                                                                \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, " \
    "%77, %78, %79"
#define SVDQ_NAMES_96                                                   \
    SVDQ_NAMES_80                                                       \
    ", "                                                                \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, " \
    "%93, %94, %95"
#define SVDQ_NAMES_112                                               \
    SVDQ_NAMES_96                                                    \
    ", "                                                             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
    "%107, %108, %109, %110, %111"
#define SVDQ_NAMES_128                                                   \
    SVDQ_NAMES_112                                                       \
    ", "                                                                 \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
    "%123, %124, %125, %126, %127"
#define SVDQ_SUMS_16(con) SVDQ_16(con, 0)
#define SVDQ_SUMS_24(con) SVDQ_16(con, 0), SVDQ_8(con, 16)
#define SVDQ_SUMS_32(con) SVDQ_32(con, 0)
#define SVDQ_SUMS_48(con) SVDQ_32(con, 0), SVDQ_16(con, 32)
#define SVDQ_SUMS_64(con) SVDQ_64(con, 0)
#define SVDQ_SUMS_80(con) SVDQ_64(con, 0), SVDQ_16(con, 64)
#define SVDQ_SUMS_96(con) SVDQ_64(con, 0), SVDQ_32(con, 64)
#define SVDQ_SUMS_112(con) SVDQ_64(con, 0), SVDQ_32(con, 64), SVDQ_16(con, 96)
#define SVDQ_SUMS_128(con) SVDQ_64(con, 0), SVDQ_64(con, 64)

// in0 to in5: the numbers of the operands behind the sums.
#define SVDQ_PRODUCTS(columns, sums, in0, in1, in2, in3, in4, in5)                           \
    SVDQ_DEVICE void multiply_int8(int (&r)[sums], u64 a, u64 b, bool keep) {                \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #in2                                 \
                     ", 0; wgmma.mma_async.sync.aligned.m64n" #columns                       \
                     "k32.s32.s8.s8 {" SVDQ_NAMES_##sums "}, %" #in0 ", %" #in1 ", p; }"     \
                     : SVDQ_SUMS_##sums("+r")                                                \
                     : "l"(a), "l"(b), "r"((int)keep));                                      \
    }                                                                                        \
    template <class T>                                                                       \
    SVDQ_DEVICE void multiply_16bit(float (&r)[sums], u64 a, u64 b) {                        \
        if (T::kIsBf16)                                                                      \
            SVDQ_MULTIPLY_SHARED("bf16", columns, sums, in0, in1);                           \
        else                                                                                 \
            SVDQ_MULTIPLY_SHARED("f16", columns, sums, in0, in1);                            \
    }                                                                                        \
    template <class T>                                                                       \
    SVDQ_DEVICE void multiply_16bit(float (&r)[sums], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, \
                                    bool keep) {                                             \
        if (T::kIsBf16)                                                                      \
            SVDQ_MULTIPLY_REGISTERS("bf16", columns, sums, in0, in1, in2, in3, in4, in5);    \
        else                                                                                 \
            SVDQ_MULTIPLY_REGISTERS("f16", columns, sums, in0, in1, in2, in3, in4, in5);     \
    }
#define SVDQ_MULTIPLY_SHARED(type, columns, sums, in0, in1)                            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
                 " {" SVDQ_NAMES_##sums "}, %" #in0 ", %" #in1 ", 1, 1, 1, 0, 0;"      \
                 : SVDQ_SUMS_##sums("+f")                                              \
                 : "l"(a), "l"(b))
#define SVDQ_MULTIPLY_REGISTERS(type, columns, sums, in0, in1, in2, in3, in4, in5)                \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #in5                                          \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type       \
                 " {" SVDQ_NAMES_##sums "}, {%" #in0 ", %" #in1 ", %" #in2 ", %" #in3 "}, %" #in4 \
                                        ", p, 1, 1, 0; }"                                         \
                 : SVDQ_SUMS_##sums("+f")                                                         \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"((int)keep))

SVDQ_PRODUCTS(32, 16, 16, 17, 18, 19, 20, 21)
SVDQ_PRODUCTS(48, 24, 24, 25, 26, 27, 28, 29)
SVDQ_PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37)
SVDQ_PRODUCTS(96, 48, 48, 49, 50, 51, 52, 53)
SVDQ_PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69)
SVDQ_PRODUCTS(160, 80, 80, 81, 82, 83, 84, 85)
SVDQ_PRODUCTS(192, 96, 96, 97, 98, 99, 100, 101)
SVDQ_PRODUCTS(224, 112, 112, 113, 114, 115, 116, 117)
SVDQ_PRODUCTS(256, 128, 128, 129, 130, 131, 132, 133)
#undef SVDQ_PRODUCTS
#undef SVDQ_MULTIPLY_SHARED
#undef SVDQ_MULTIPLY_REGISTERS

// The compiler does not know that products write their registers until they are waited for: this
// keeps it from using them before, and from starting new ones while it does.
template <int Count>
SVDQ_DEVICE void products_fence_sums(u32 (&r)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
        asm volatile("" : "+r"(r[i])::"memory");
}
template <int Count>
SVDQ_DEVICE void products_fence_sums(int (&r)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
        asm volatile("" : "+r"(r[i])::"memory");
}
template <int Count>
SVDQ_DEVICE void products_fence_sums(float (&r)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
        asm volatile("" : "+f"(r[i])::"memory");
}

// ---- pairs of fp16 ------------------------------------------------------------------------------

SVDQ_DEVICE u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Two float32 to 16 bits; what is too large becomes the type's largest.
template <class T>
SVDQ_DEVICE u32 pack_saturated(float low, float high) {
    u32 r;
    if (T::kIsBf16)
        asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Two E4M3 numbers, each alone in its register, to a pair of fp16.
SVDQ_DEVICE u32 e4m3_pair_to_fp16(u32 low, u32 high) {
    u32 r;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e4m3x2 %0, h; }"
        : "=r"(r)
        : "r"(low | high << 8));
    return r;
}

// The other way from load_matrices: lane l passes the address of row l % 8 of matrix l / 8.
SVDQ_DEVICE void store_matrices(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// The other way from load_matrices_transposed.
SVDQ_DEVICE void store_matrices_transposed(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
        "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
}
