// The few machine instructions the kernels need, as inline PTX.
//
// No CUDA header is included anywhere in this folder: torch carries the runtime compiler (NVRTC)
// but not the toolkit's headers, and this source has to compile with what torch carries.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define SVDQ_DEVICE __device__ __forceinline__

// The architecture number that decides between instructions; the host pass of nvcc sees none.
#ifdef __CUDA_ARCH__
#    define SVDQ_ARCH __CUDA_ARCH__
#else
#    define SVDQ_ARCH 800
#endif

constexpr int kGroup = 64;               // columns that share a scale
constexpr float kGeluShift = 0.171875f;  // added to a GELU's output before unsigned quantization
constexpr float kFloatMax = 3.402823466e38f;
constexpr float kFloatTiny = 1.175494351e-38f;  // the smallest normal float32

SVDQ_DEVICE float as_float(u32 bits) {
    return __int_as_float((int)bits);
}
SVDQ_DEVICE u32 as_bits(float value) {
    return (u32)__float_as_int(value);
}

// ---- 16-bit floating point: a pair in a register, the first in the low half ---------------------

struct Bf16 {
    static constexpr bool kIsBf16 = true;
    static constexpr float kLargest = 3.3895313892515355e38f;

    static SVDQ_DEVICE float low(u32 pair) {
        return as_float(pair << 16);
    }
    static SVDQ_DEVICE float high(u32 pair) {
        return as_float(pair & 0xFFFF0000u);
    }
    static SVDQ_DEVICE u32 pack(float low, float high) {
        u32 pair;
#if SVDQ_ARCH >= 800
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
        pair = 0;  // sm_75 has no bf16 instructions; the host never launches this
#endif
        return pair;
    }
#if SVDQ_ARCH >= 900
    static SVDQ_DEVICE u32 multiply(u32 a, u32 b) {
        u32 product;
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
        return product;
    }
    static SVDQ_DEVICE u32 magnitudes(u32 pair) {
        u32 result;
        asm("abs.bf16x2 %0, %1;" : "=r"(result) : "r"(pair));
        return result;
    }
    static SVDQ_DEVICE u32 larger(u32 a, u32 b) {
        u32 result;
        asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
        return result;
    }
#endif
};

struct Fp16 {
    static constexpr bool kIsBf16 = false;
    static constexpr float kLargest = 65504.f;

    static SVDQ_DEVICE float low(u32 pair) {
        float value;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
        return value;
    }
    static SVDQ_DEVICE float high(u32 pair) {
        float value;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
        return value;
    }
    static SVDQ_DEVICE u32 pack(float low, float high) {
        u32 pair;
#if SVDQ_ARCH >= 800
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
        asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
            : "=r"(pair)
            : "f"(low), "f"(high));
#endif
        return pair;
    }
#if SVDQ_ARCH >= 900
    static SVDQ_DEVICE u32 multiply(u32 a, u32 b) {
        u32 product;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
        return product;
    }
    static SVDQ_DEVICE u32 magnitudes(u32 pair) {
        u32 result;
        asm("abs.f16x2 %0, %1;" : "=r"(result) : "r"(pair));
        return result;
    }
    static SVDQ_DEVICE u32 larger(u32 a, u32 b) {
        u32 result;
        asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
        return result;
    }
#endif
};

// The type of a build.
#ifndef SVDQ_BF16  // ---- editors and linters see this one ----
#    define SVDQ_BF16 1
#endif
#if SVDQ_BF16
using T = Bf16;
#else
using T = Fp16;
#endif

// Overflow saturates, so that no finite input ever makes an infinity, let alone inf - inf.
template <class T>
SVDQ_DEVICE float saturate(float value) {
    return fminf(fmaxf(value, -T::kLargest), T::kLargest);
}

// ---- x . proj_down, which is kept in 16 bits
//
// For fp16 a row is multiplied by 2^(10 - exponent of its largest), which the GEMM takes back.
// Small ones stay small: what is added to their products is divided by the same.
SVDQ_DEVICE float down_power(float largest) {
    const int exponent = 137 - (int)(as_bits(largest) >> 23);
    return as_float((u32)(max(min(exponent, 30), -100) + 127) << 23);
}

// Two of a row's, in range of products that are added unchecked.
template <class T>
SVDQ_DEVICE u32 pack_down(float low, float high) {
    constexpr float kMost = T::kIsBf16 ? 0x1p96f : T::kLargest;
    return T::pack(fminf(fmaxf(low, -kMost), kMost), fminf(fmaxf(high, -kMost), kMost));
}

// ---- arithmetic ---------------------------------------------------------------------------------

// 1 / x as the hardware estimates it; what is too small for a normal number counts as zero.
SVDQ_DEVICE float reciprocal_estimate(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 / x to the last bit or nearly: the hardware's estimate and one Newton step.
SVDQ_DEVICE float reciprocal(float x) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    return fmaf(r, fmaf(-x, r, 1.f), r);
}

// GELU (tanh form) as x * sigmoid(2u): two special-function instructions, good to about 1e-6.
SVDQ_DEVICE float gelu_tanh(float x) {
    constexpr float kScale = -2.f * 0.7978845608028654f * 1.4426950408889634f;
    float u = x * fmaf(0.044715f * kScale, x * x, kScale);  // -2u log2(e)
    float e, r;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(u));
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
    return x * r;
}

// The lowest bytes of four words, the first lowest.
SVDQ_DEVICE u32 low_bytes(const u32 (&words)[4]) {
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040),
                       __byte_perm(words[2], words[3], 0x0040), 0x5410);
}

// The products of two pairs of fp16.
SVDQ_DEVICE u32 multiply_pairs(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

SVDQ_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// The largest over a quad: the four lanes that hold one row of a fragment.
SVDQ_DEVICE float quad_max(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

SVDQ_DEVICE float quad_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

// threadIdx.x, read anew: the compiler cannot know that it already has it.
SVDQ_DEVICE int read_thread_again() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// ---- memory -------------------------------------------------------------------------------------

SVDQ_DEVICE u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

// Asynchronous copies, global to shared; sm_75 has none and copies at once. Where `valid` is false
// they write zeros and read nothing.
template <int Bytes>
SVDQ_DEVICE void copy_or_zero(u32 shared, const void* global, bool valid);

template <>
SVDQ_DEVICE void copy_or_zero<16>(u32 shared, const void* global, bool valid) {
#if SVDQ_ARCH >= 800
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) v = *(const uint4*)global;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

template <>
SVDQ_DEVICE void copy_or_zero<4>(u32 shared, const void* global, bool valid) {
#if SVDQ_ARCH >= 800
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
#else
    u32 v = valid ? *(const u32*)global : 0;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(v) : "memory");
#endif
}

SVDQ_DEVICE void copy_commit() {
#if SVDQ_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `Pending` committed groups of this thread are still under way.
template <int Pending>
SVDQ_DEVICE void copy_wait() {
#if SVDQ_ARCH >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

SVDQ_DEVICE uint4 load_shared16(u32 shared) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared));
    return v;
}

// 16 bytes, in the order of the source, which the compiler would not keep.
SVDQ_DEVICE uint4 load_global16_in_order(const void* from) {
    uint4 v;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

SVDQ_DEVICE void store_shared4(u32 shared, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

SVDQ_DEVICE void store_shared8(u32 shared, u32 first, u32 second) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(first), "r"(second)
                 : "memory");
}

SVDQ_DEVICE void store_shared16(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

SVDQ_DEVICE uint2 load_shared8(u32 shared) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared));
    return v;
}

SVDQ_DEVICE u32 load_shared1(u32 shared) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(shared));
    return v;
}

SVDQ_DEVICE u32 load_shared4(u32 shared) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(shared));
    return v;
}

SVDQ_DEVICE void shared_add(u32 shared, int value) {
    asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

SVDQ_DEVICE void shared_maximum(u32 shared, u32 value) {
    asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

// ---- kernels that start before the one in front of them has ended (Launcher.launch, `early`) ----
//
// From sm_90 on; older cards' kernels start when their turn comes.

// All blocks have begun: those of the next kernel may take the places that become free.
SVDQ_DEVICE void let_next_kernel_start() {
#if SVDQ_ARCH >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until everything that the kernel before wrote can be read.
SVDQ_DEVICE void wait_for_kernel_before() {
#if SVDQ_ARCH >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A hint to fetch a line into the second-level cache. It reads nothing, so it may come before that
// wait, whatever the kernel before writes: there a line is as new as any read finds it.
SVDQ_DEVICE void prefetch_line(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// ---- matrix fragments ---------------------------------------------------------------------------

// Four 8 x 16-byte matrices: lane l passes the address of row l % 8 of matrix l / 8; afterwards
// lane l holds, of each matrix, bytes 4 (l % 4) .. + 3 of row l / 4.
SVDQ_DEVICE void load_matrices(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared));
}

// The same for 8 x 8 matrices of 16-bit elements, transposed: lane l holds column l / 4 of rows
// 2 (l % 4) and + 1.
SVDQ_DEVICE void load_matrices_transposed(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared));
}

// acc (16 x 8, float32) += a (16 x 16) b (16 x 8), 16-bit operands.
template <class T>
SVDQ_DEVICE void mma_16bit(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <>
SVDQ_DEVICE void mma_16bit<Bf16>(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if SVDQ_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
SVDQ_DEVICE void mma_16bit<Fp16>(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if SVDQ_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// result (16 x 8, int32) = a (16 x 64) b (64 x 8) + c in every element. a is signed or unsigned
// 4-bit, b signed. Lane l holds of a: 8 columns 8 (l % 4) .. of rows l / 4 and + 8, then the same
// 32 columns on; of b likewise, by output column; of the result: columns 2 (l % 4) and + 1 of
// rows l / 4 and + 8.
template <bool Unsigned>
SVDQ_DEVICE void mma_4bit(u32 (&result)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 c) {
#if SVDQ_STANDIN
    // For timing only, and wrong: the int8 products that cost a Hopper tensor core what the 4-bit
    // one costs Ada's.
    asm("{ .reg .b32 t0, t1, t2, t3;"
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {t0, t1, t2, t3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {t0, t1, t2, t3}; }"
        : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
#elif SVDQ_ARCH >= 800
#    define SVDQ_MMA(TYPE)                                                       \
        asm("mma.sync.aligned.m16n8k64.row.col.s32." TYPE                        \
            ".s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "             \
            "{%10, %10, %10, %10};"                                              \
            : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3]) \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c))
    if (Unsigned)
        SVDQ_MMA("u4");
    else
        SVDQ_MMA("s4");
#    undef SVDQ_MMA
#else
    // sm_75 has a quarter of it, m8n8k32, with the same fragments.
#    define SVDQ_MMA(TYPE, r0, r1, a, b)                                                           \
        asm("mma.sync.aligned.m8n8k32.row.col.s32." TYPE ".s4.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" \
            : "+r"(r0), "+r"(r1)                                                                   \
            : "r"(a), "r"(b))
#    define SVDQ_MMA4(TYPE)                             \
        SVDQ_MMA(TYPE, result[0], result[1], a[0], b0); \
        SVDQ_MMA(TYPE, result[2], result[3], a[1], b0); \
        SVDQ_MMA(TYPE, result[0], result[1], a[2], b1); \
        SVDQ_MMA(TYPE, result[2], result[3], a[3], b1)
    result[0] = result[1] = result[2] = result[3] = c;
    if (Unsigned) {
        SVDQ_MMA4("u4");
    } else {
        SVDQ_MMA4("s4");
    }
#    undef SVDQ_MMA4
#    undef SVDQ_MMA
#endif
}

// sum (16 x 8, int32) += a (16 x 32) b (32 x 8), signed bytes.
SVDQ_DEVICE void mma_8bit(int (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if SVDQ_ARCH >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // sm_75 has a quarter of it, m8n8k16, with the same fragments.
#    define SVDQ_MMA(r0, r1, a, b)                                                           \
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" \
            : "+r"(r0), "+r"(r1)                                                             \
            : "r"(a), "r"(b))
    SVDQ_MMA(sum[0], sum[1], a[0], b0);
    SVDQ_MMA(sum[2], sum[3], a[1], b0);
    SVDQ_MMA(sum[0], sum[1], a[2], b1);
    SVDQ_MMA(sum[2], sum[3], a[3], b1);
#    undef SVDQ_MMA
#endif
}
