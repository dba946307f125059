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

// A barrier for the 128 threads of one of a block's consumer warpgroups.
SVDQ_DEVICE void warpgroup_sync(u32 index) {
    asm volatile("bar.sync %0, 128;" ::"r"(index + 1) : "memory");
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
#define SVDQ_NAMES80                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
    "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"

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

// r (64 x 160, float32) += a (64 x 16) b (160 x 16)^T, 16-bit operands. Registers 4 j + 2 h and + 1
// hold what register 2 j + h holds above.
#define SVDQ_MULTIPLY_16BIT(TYPE)                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32." TYPE "." TYPE " {" SVDQ_NAMES80 \
                 "}, %80, %81, 1, 1, 1, 0, 0;"                                                  \
                 : SVDQ_64("+f", 0), SVDQ_16("+f", 64)                                          \
                 : "l"(a), "l"(b))
template <class T>
SVDQ_DEVICE void multiply_16bit(float (&r)[80], u64 a, u64 b) {
    if (T::kIsBf16)
        SVDQ_MULTIPLY_16BIT("bf16");
    else
        SVDQ_MULTIPLY_16BIT("f16");
}
#undef SVDQ_MULTIPLY_16BIT

// The compiler does not know that products write their registers until they are waited for: this
// keeps it from using them before, and from starting new ones while it does.
template <int Count>
SVDQ_DEVICE void products_fence_sums(u32 (&r)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
        asm volatile("" : "+r"(r[i])::"memory");
}

// ---- pairs of fp16 ------------------------------------------------------------------------------

SVDQ_DEVICE u32 multiply_pairs(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
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

// The other way from load_matrices: lane l passes the address of row l % 8 of matrix l / 8.
SVDQ_DEVICE void store_matrices(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
