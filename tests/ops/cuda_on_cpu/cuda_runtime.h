// As much of CUDA's runtime as csrc/*.cu need, on the CPU: thread blocks run one after the other, the threads
// of a block in turns, from one __syncthreads to the next. It shows that a kernel computes the right thing,
// not that it is fast or free of races.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#define __CUDACC__
#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
    unsigned x, y, z, w;
};

inline dim3 blockIdx, threadIdx;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

// How many parts an image is cut into depends on it, so tests set it.
inline int processors_of_the_device = 1;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = processors_of_the_device, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
    return std::memset(at, value, bytes), cudaSuccess;
}

// The threads of the block that runs.
class Turns {
 public:
    void run(unsigned threads, std::function<void()> body) {
        constexpr std::size_t kStack = 1 << 16;
        body_ = body;
        stacks_.resize(threads * kStack);
        threads_.assign(threads, {});
        for (unsigned i = 0; i < threads; ++i) {
            ucontext_t& context = threads_[i].context;
            getcontext(&context);
            context.uc_stack.ss_sp = &stacks_[i * kStack];
            context.uc_stack.ss_size = kStack;
            context.uc_link = &scheduler_;
            makecontext(&context, start, 0);
        }
        for (unsigned left = threads; left > 0;)
            for (unsigned i = 0; i < threads; ++i) {
                if (threads_[i].ended) continue;
                threadIdx = dim3(i);
                running_ = &threads_[i];
                swapcontext(&scheduler_, &running_->context);
                if (running_->ended) --left;
            }
    }
    void end_turn() { swapcontext(&running_->context, &scheduler_); }

 private:
    struct Thread {
        ucontext_t context;
        bool ended;
    };
    static void start();

    std::function<void()> body_;
    std::vector<char> stacks_;
    std::vector<Thread> threads_;
    Thread* running_ = nullptr;
    ucontext_t scheduler_;
};

inline Turns turns;

inline void Turns::start() {
    turns.body_();
    turns.running_->ended = true;
}

inline void __syncthreads() { turns.end_turn(); }

// All threads of a block must come to these, since a turn is every thread's.
constexpr unsigned kWarpOnCpu = 32;

template <typename T>
const T* values_of_warp(T value) {
    static T values[1024];
    values[threadIdx.x] = value;
    turns.end_turn();
    return values + threadIdx.x / kWarpOnCpu * kWarpOnCpu;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned distance) {
    const T other = values_of_warp(value)[threadIdx.x % kWarpOnCpu ^ distance];
    turns.end_turn();
    return other;
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % kWarpOnCpu;
    const T other = values_of_warp(value)[lane >= distance ? lane - distance : lane];
    turns.end_turn();
    return other;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    const unsigned* values = values_of_warp(value);
    const unsigned largest = *std::max_element(values, values + kWarpOnCpu);
    turns.end_turn();
    return largest;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    const unsigned* values = values_of_warp(value);
    const unsigned sum = std::accumulate(values, values + kWarpOnCpu, 0u);
    turns.end_turn();
    return sum;
}
inline unsigned __ballot_sync(unsigned, bool value) {
    const bool* values = values_of_warp(value);
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < kWarpOnCpu; ++lane) lanes |= static_cast<unsigned>(values[lane]) << lane;
    turns.end_turn();
    return lanes;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __ffs(int value) { return __builtin_ffs(value); }

using std::max;
using std::min;

inline int __viaddmin_s32_relu(int a, int b, int c) { return max(min(a + b, c), 0); }

// Two 16-bit numbers in a word.
template <typename Number, typename Operation>
unsigned of_halves(unsigned a, unsigned b, unsigned c, Operation operation) {
    unsigned result = 0;
    for (int shift : {0, 16}) {
        const int number = operation(static_cast<Number>(a >> shift), static_cast<Number>(b >> shift),
                                     static_cast<Number>(c >> shift));
        result |= (static_cast<unsigned>(number) & 0xffffu) << shift;
    }
    return result;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return of_halves<std::uint16_t>(a, b, 0, [](int x, int y, int) { return max(x, y); });
}
inline unsigned __viaddmin_s16x2_relu(unsigned a, unsigned b, unsigned c) {
    return of_halves<std::int16_t>(a, b, c, __viaddmin_s32_relu);
}

template <typename T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at += value;
    return before;
}

template <typename Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 blocks, dim3 threads, void** arguments,
                             std::size_t, cudaStream_t) {
    for (unsigned block = 0; block < blocks.x; ++block) {
        blockIdx = dim3(block);
        turns.run(threads.x, [=] { kernel(*static_cast<Argument*>(arguments[0])); });
    }
    return cudaSuccess;
}
