// Runs one build of a kernel on the CPU: its blocks one after another, their threads as threads.
#include <thread>

#include "device.cuh"

thread_local uint3 threadIdx, blockIdx;
uint3 blockDim, gridDim;
__align__(1024) u8 emulated_memory[228 * 1024];
Warp* emulated_warps;
pthread_barrier_t emulated_block;
thread_local std::vector<Copies> emulated_copies;

#include SVDQ_SOURCE

template <class Arguments>
void call(void (*kernel)(Arguments), const void* arguments) {
    kernel(*(const Arguments*)arguments);
}

extern "C" void run(const void* arguments, u32 x, u32 y, u32 z, u32 threads) {
    gridDim = {x, y, z};
    blockDim = {threads, 1, 1};
    std::vector<Warp> warps(threads / 32);
    emulated_warps = warps.data();
    for (Warp& warp : warps)
        pthread_barrier_init(&warp.barrier, nullptr, 32);
    pthread_barrier_init(&emulated_block, nullptr, threads);
    for (u32 block = 0; block < x * y * z; ++block) {
        std::memset(emulated_memory, 0xFF,
                    sizeof(emulated_memory));  // not a number, whatever the type
        std::vector<std::thread> lanes;
        for (u32 thread = 0; thread < threads; ++thread)
            lanes.emplace_back([=] {
                threadIdx = {thread, 0, 0};
                blockIdx = {block % x, block / x % y, block / x / y};
                emulated_copies.assign(1, {});
                call(SVDQ_ENTRY, arguments);
            });
        for (std::thread& lane : lanes)
            lane.join();
    }
}
