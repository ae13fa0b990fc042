// One kernel an activation. Several thread blocks share an image, each a part of it; the last of them to
// finish puts the parts together. As on the CPU the median is found by counting in a grid over what a sample
// says of it; where the grid missed it, the last block reads its image again.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "magnitude.hpp"
#include "magnitude_keys.hpp"

namespace activemark {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
// Values of an image: so many a thread has registers for, or all of them and little beside.
constexpr int kVeryFew = 8, kFew = 16;
constexpr int kBins = 512;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kSample = 2 * kThreads;
constexpr int kNeighbours = 8;
// Ranks of the sample on either side of its median: of 64 images, reading one again takes as long as all the
// rest.
constexpr int kFourErrors = 45;
constexpr std::int64_t kSmallestPart = 8192;
// Values of a part that are looked at twice: the first cache holds them.
constexpr std::int64_t kFirst = 8192;
constexpr int kCandidates = 2048;      // large values of a part that wait to be ranked
constexpr int kPartsPerProcessor = 3;  // as many blocks as its registers have room for

// A magnitude and where it is; the larger ranks first, of equal ones the lower position.
using Ranked = std::uint64_t;
constexpr Ranked kNothing = 0;
constexpr std::int64_t kLargestPosition = 0xfffffffe;

__device__ Ranked ranked(std::int32_t key, std::int64_t position) {
    // Key 0 at the last position must not be kNothing.
    return static_cast<Ranked>(key) << 32 | (0xffffffffu - static_cast<std::uint32_t>(position));
}
__device__ std::int32_t key_of_ranked(Ranked entry) { return static_cast<std::int32_t>(entry >> 32); }
__device__ std::int64_t position_of_ranked(Ranked entry) {
    return 0xffffffffu - static_cast<std::uint32_t>(entry);
}

// Bins of 2^shift keys, from `first` on.
struct Grid {
    std::int32_t first;
    int shift;
    int bins;
};

__device__ Grid grid_over(KeyRange range) {
    int shift = 0;
    while ((range.last - range.first) >> shift >= kBins) ++shift;
    return {range.first, shift, ((range.last - range.first) >> shift) + 1};
}

// What one part leaves for the block that puts them together.
struct Part {
    Ranked top[kMostTopCuda];
    double squares;
    unsigned long long below;
    unsigned long long nonfinite;
    unsigned bins[kBins];
};

struct Job {
    Activations in;
    std::int64_t k;
    Magnitudes out;
    Part* parts;         // images * parts_per_image
    unsigned* finished;  // of each image, zeros
    int parts_per_image;
};

// What the threads of a block share.
struct Shared {
    std::int32_t sample[kSample];
    unsigned bins[kBins];
    unsigned long long below;
    unsigned long long nonfinite;
    int threshold;
    unsigned candidates;
    Ranked candidate[kCandidates];
    Ranked entries[kThreads];
    double sums[kWarps];
    unsigned long long counts[kWarps];
    std::int32_t found_bin;
    bool last;
};

// The k largest that a thread has seen, in descending order.
template <int kMost>
struct Top {
    Ranked entries[kMost];

    __device__ Top() {
        for (int i = 0; i < kMost; ++i) entries[i] = kNothing;
    }
    __device__ void insert(Ranked entry) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const Ranked here = entries[i];
            entries[i] = entry > here ? entry : here;
            entry = entry > here ? here : entry;
        }
    }
};

// The largest entry of the warp, to all its threads.
__device__ Ranked largest_of_warp(Ranked entry) {
    const unsigned key = static_cast<unsigned>(entry >> 32);
    const unsigned largest = __reduce_max_sync(kAllLanes, key);
    const unsigned low = key == largest ? static_cast<unsigned>(entry) : 0;
    return static_cast<Ranked>(largest) << 32 | __reduce_max_sync(kAllLanes, low);
}

// The largest of the threads' entries goes to out[0], the next to out[1] …; all threads must call.
template <int kMost>
__device__ void merge_tops(Top<kMost>& top, int k, Ranked* out, Shared& shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int rank = 0; rank < k; ++rank) {
        const Ranked best = largest_of_warp(top.entries[0]);
        if (lane == 0) shared.entries[warp * k + rank] = best;
        if (best != kNothing && best == top.entries[0]) {
#pragma unroll
            for (int i = 0; i + 1 < kMost; ++i) top.entries[i] = top.entries[i + 1];
            top.entries[kMost - 1] = kNothing;
        }
    }
    __syncthreads();
    // Now the warps' lists, each by a lane; every warp does it, the first one tells.
    int taken = 0;
    for (int rank = 0; rank < k; ++rank) {
        const Ranked head = lane < kWarps && taken < k ? shared.entries[lane * k + taken] : kNothing;
        const Ranked best = largest_of_warp(head);
        if (best != kNothing && best == head) ++taken;
        if (threadIdx.x == 0) out[rank] = best;
    }
    __syncthreads();
}

// The sum over all threads, in a fixed order; all threads must call.
__device__ double sum_of(double value, Shared& shared) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(kAllLanes, value, distance);
    if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp];
    __syncthreads();
    return sum;
}

// Values that were loaded together.
template <typename Bits, int kCount>
struct Loaded {
    Bits values[kCount];
    static constexpr int count = kCount;
};

// Calls take(loaded, position of the first) for the values start ... end - 1, 16 bytes at a time where they
// are aligned.
template <typename Bits, typename Take>
__device__ void for_each(const Bits* x, std::int64_t start, std::int64_t end, Take take) {
    constexpr int kLanes = 16 / sizeof(Bits);
    const std::int64_t misplaced =
        static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(x + start) / sizeof(Bits)) % kLanes;
    const std::int64_t head = misplaced == 0 ? start : start + kLanes - misplaced;
    const std::int64_t aligned = head < end ? head : end;
    const std::int64_t vectors = (end - aligned) / kLanes;
    for (std::int64_t i = start + threadIdx.x; i < aligned; i += kThreads) take(Loaded<Bits, 1>{{x[i]}}, i);
    const uint4* vector = reinterpret_cast<const uint4*>(x + aligned);
#pragma unroll 2
    for (std::int64_t i = threadIdx.x; i < vectors; i += kThreads) {
        const uint4 loaded = vector[i];
        const unsigned words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        Loaded<Bits, kLanes> values;
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
            constexpr int kPerWord = kLanes / 4;
            values.values[lane] = static_cast<Bits>(words[lane / kPerWord] >> (lane % kPerWord * 16));
        }
        take(values, aligned + i * kLanes);
    }
    for (std::int64_t i = aligned + vectors * kLanes + threadIdx.x; i < end; i += kThreads)
        take(Loaded<Bits, 1>{{x[i]}}, i);
}

// What a sample says of the image, the same for all its parts: where the median probably is, and a key that
// at least k values reach.
struct Sampled {
    KeyRange median;
    std::int32_t reached;
};

template <typename Format>
__device__ Sampled sample(const typename Format::Bits* x, std::int64_t count, std::int64_t k,
                          Shared& shared) {
    const Sampled nothing{{0, Format::kInfinity - 1}, -1};
    if (count < kSmallestPart) return nothing;  // in more than that no value is sampled twice
    for (int i = threadIdx.x; i < kSample; i += kThreads) {
        // Multiples of the golden ratio, modulo 1, fall everywhere and in step with no width.
        const std::uint64_t share = ((i / kNeighbours) * std::uint64_t{0x9e3779b97f4a7c15}) >> 32;
        const std::uint64_t place = (share * static_cast<std::uint64_t>(count - kNeighbours)) >> 32;
        shared.sample[i] = key_of<Format>(x[place + i % kNeighbours]);
    }
    __syncthreads();
    // A bitonic sort: a thread has one pair in each step.
    static_assert(kSample == 2 * kThreads, "a thread has one pair of the sample");
    for (int size = 2; size <= kSample; size *= 2) {
        for (int stride = size / 2; stride > 0; stride /= 2) {
            const int low =
                2 * static_cast<int>(threadIdx.x) - (static_cast<int>(threadIdx.x) & (stride - 1));
            const std::int32_t a = shared.sample[low], b = shared.sample[low + stride];
            const bool rising = (low & size) == 0;
            if ((a > b) == rising) {
                shared.sample[low] = b;
                shared.sample[low + stride] = a;
            }
            // A warp's pairs with a stride up to its width are all of the same 64 values.
            if (stride > kWarp || (stride == 1 && size >= 2 * kWarp)) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
    if (shared.sample[kSample - 1] >= Format::kInfinity) return nothing;
    return {{shared.sample[kSample / 2 - kFourErrors], shared.sample[kSample / 2 + kFourErrors]},
            shared.sample[kSample - k]};
}

// Finds the bin where a rank falls, in `bins` (shared); all threads must call. Returns -1 if in none.
__device__ int bin_of_rank(const unsigned* bins, unsigned long long rank, Shared& shared) {
    const int thread = threadIdx.x;
    unsigned long long mine = 0;
    for (int i = 0; i < kBinsPerThread; ++i) mine += bins[thread * kBinsPerThread + i];
    unsigned long long up_to = mine;  // and with, of the warp
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const unsigned long long lower = __shfl_up_sync(kAllLanes, up_to, distance);
        if (thread % kWarp >= distance) up_to += lower;
    }
    if (thread % kWarp == kWarp - 1) shared.counts[thread / kWarp] = up_to;
    if (thread == 0) shared.found_bin = -1;
    __syncthreads();
    unsigned long long before = up_to - mine;
    for (int warp = 0; warp < thread / kWarp; ++warp) before += shared.counts[warp];
    if (before <= rank && rank < before + mine) {
        unsigned long long left = rank - before;
        int bin = thread * kBinsPerThread;
        while (left >= bins[bin]) left -= bins[bin++];
        shared.found_bin = bin;
    }
    __syncthreads();
    return shared.found_bin;
}

// The value of a rank (from 0) among the keys of `range`, all `inside` of which are counted in shared.bins.
template <typename Format>
__device__ float find(const typename Format::Bits* x, std::int64_t count, Grid grid, KeyRange range,
                      unsigned long long below, unsigned long long rank, Shared& shared) {
    while (true) {
        int bin = -1;
        if (rank >= below) bin = bin_of_rank(shared.bins, rank - below, shared);
        if (bin >= 0) {
            const std::int32_t first = grid.first + (bin << grid.shift);
            const std::int32_t last = first + ((1 << grid.shift) - 1);
            range = {first, last < range.last ? last : range.last};
            if (close_enough<Format>(range)) return middle_of<Format>(range);
        } else if (rank < below) {
            range = {0, range.first - 1};
        } else {
            range = {range.last + 1, Format::kInfinity - 1};
        }
        grid = grid_over(range);
        __syncthreads();
        for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
        if (threadIdx.x == 0) shared.below = 0;
        __syncthreads();
        unsigned long long mine = 0;
        for_each(x, 0, count, [&](const auto& loaded, std::int64_t) {
#pragma unroll
            for (int i = 0; i < loaded.count; ++i) {
                const std::int32_t key = key_of<Format>(loaded.values[i]);
                mine += key < range.first;
                if (key >= range.first && key <= range.last)
                    atomicAdd(&shared.bins[(key - grid.first) >> grid.shift], 1u);
            }
        });
        atomicAdd(&shared.below, mine);
        __syncthreads();
        below = shared.below;
    }
}

// A key that at least k values of start ... end - 1 reach: each thread has met one that is as large as the
// largest it has met. -1 where too few have met any. All threads must call.
template <typename Format>
__device__ std::int32_t reached_by_first(const typename Format::Bits* x, std::int64_t start, std::int64_t end,
                                         int k, Shared& shared) {
    std::int32_t largest = -1;
    for_each(x, start, end < start + kFirst ? end : start + kFirst, [&](const auto& loaded, std::int64_t) {
#pragma unroll
        for (int i = 0; i < loaded.count; ++i) {
            const std::int32_t key = key_of<Format>(loaded.values[i]);
            if (key > largest && key < Format::kInfinity) largest = key;
        }
    });
    Top<1> met;
    if (largest >= 0) met.insert(ranked(largest, threadIdx.x));
    merge_tops(met, k, shared.candidate, shared);
    const Ranked last = shared.candidate[k - 1];
    return last == kNothing ? -1 : key_of_ranked(last);
}

template <typename Format, int kMost>
__global__ void __launch_bounds__(kThreads, kMost <= kFew ? kPartsPerProcessor : 1) measure(Job job) {
    __shared__ Shared shared;
    const int thread = threadIdx.x;
    const std::int64_t image = blockIdx.x / job.parts_per_image;
    const int part_number = blockIdx.x % job.parts_per_image;
    const std::int64_t count = job.in.values_per_image;
    const auto* x = static_cast<const typename Format::Bits*>(job.in.x) + image * job.in.image_stride;
    Part* parts = job.parts + image * job.parts_per_image;

    for (int i = thread; i < kBins; i += kThreads) shared.bins[i] = 0;
    const Sampled sampled = sample<Format>(x, count, job.k, shared);
    const KeyRange range = sampled.median;
    const Grid grid = grid_over(range);
    const std::int64_t start = count * part_number / job.parts_per_image;
    const std::int64_t end = count * (part_number + 1) / job.parts_per_image;
    // One of some hundred values is as large as the sample's k-th largest, one of some thousand as this. Both
    // are wanted: a part may begin with small values.
    const std::int32_t first = reached_by_first<Format>(x, start, end, static_cast<int>(job.k), shared);
    if (thread == 0) {
        shared.below = 0;
        shared.nonfinite = 0;
        shared.candidates = 0;
        shared.threshold = first > sampled.reached ? first : sampled.reached;
    }
    __syncthreads();

    Top<kMost> top;
    float squares = 0;
    double large_squares = 0;
    unsigned long long below = 0, nonfinite = 0;
    for_each(x, start, end, [&](const auto& loaded, std::int64_t position) {
        std::int32_t largest = -1;
#pragma unroll
        for (int i = 0; i < loaded.count; ++i) {
            const std::int32_t key = key_of<Format>(loaded.values[i]);
            if (key >= Format::kInfinity) {
                ++nonfinite;
                continue;
            }
            const float value = value_of(key, Format());
            if (key < Format::kBig) {
                squares += value * value;
            } else {
                large_squares += static_cast<double>(value) * value;
            }
            below += key < range.first;
            if (key >= range.first && key <= range.last)
                atomicAdd(&shared.bins[(key - grid.first) >> grid.shift], 1u);
            largest = key > largest ? key : largest;
        }
        // What k values are known to exceed is not among the k largest. Equal keys may still be, by their
        // position.
        if (largest < *const_cast<volatile int*>(&shared.threshold)) return;
        for (int i = 0; i < loaded.count; ++i) {
            const std::int32_t key = key_of<Format>(loaded.values[i]);
            if (key >= Format::kInfinity || key < *const_cast<volatile int*>(&shared.threshold)) continue;
            const unsigned place = atomicAdd(&shared.candidates, 1u);
            if (place < kCandidates) {
                shared.candidate[place] = ranked(key, position + i);
                continue;
            }
            top.insert(ranked(key, position + i));
            if (top.entries[kMost - 1] != kNothing)
                atomicMax(&shared.threshold, key_of_ranked(top.entries[kMost - 1]));
        }
    });
    __syncthreads();
    for (unsigned i = thread; i < kCandidates && i < shared.candidates; i += kThreads)
        top.insert(shared.candidate[i]);
    atomicAdd(&shared.below, below);
    atomicAdd(&shared.nonfinite, nonfinite);
    Part& mine = parts[part_number];
    merge_tops(top, job.k, mine.top, shared);
    const double sum = sum_of(static_cast<double>(squares) + large_squares, shared);
    if (thread == 0) {
        mine.squares = sum;
        mine.below = shared.below;
        mine.nonfinite = shared.nonfinite;
    }
    for (int i = thread; i < kBins; i += kThreads) mine.bins[i] = shared.bins[i];

    // The last part to come here finds all of them written.
    __threadfence();
    __syncthreads();
    if (thread == 0)
        shared.last = atomicAdd(&job.finished[image], 1u) + 1 == static_cast<unsigned>(job.parts_per_image);
    __syncthreads();
    if (!shared.last) return;
    __threadfence();

    for (int i = thread; i < kBins; i += kThreads) {
        unsigned inside = 0;
        for (int part = 0; part < job.parts_per_image; ++part) inside += parts[part].bins[i];
        shared.bins[i] = inside;
    }
    Top<kMost> all;
    double all_squares = 0;
    unsigned long long all_below = 0, all_nonfinite = 0;
    for (int part = 0; part < job.parts_per_image; ++part) {
        all_squares += parts[part].squares;
        all_below += parts[part].below;
        all_nonfinite += parts[part].nonfinite;
        for (int rank = thread; rank < job.k; rank += kThreads) all.insert(parts[part].top[rank]);
    }
    __syncthreads();
    merge_tops(all, job.k, parts[0].top, shared);

    const float nan = as_float(0x7fc00000);
    for (std::int64_t rank = thread; rank < job.k; rank += kThreads) {
        const Ranked entry = parts[0].top[rank];
        job.out.values[image * job.k + rank] =
            entry == kNothing ? nan : value_of(key_of_ranked(entry), Format());
        job.out.index[image * job.k + rank] = entry == kNothing ? -1 : position_of_ranked(entry);
    }
    const unsigned long long finite = static_cast<unsigned long long>(count) - all_nonfinite;
    float median = nan;
    if (finite > 0) median = find<Format>(x, count, grid, range, all_below, (finite - 1) / 2, shared);
    if (thread == 0) {
        job.out.nonfinite[image] = static_cast<std::int64_t>(all_nonfinite);
        job.out.mean_square[image] = static_cast<float>(all_squares / static_cast<double>(finite));
        job.out.median[image] = median;
    }
}

template <typename Format>
cudaError_t launch(Job& job, cudaStream_t stream) {
    void* arguments[] = {&job};
    const dim3 blocks(static_cast<unsigned>(job.in.images * job.parts_per_image)), threads(kThreads);
    if (job.k <= kVeryFew)
        return cudaLaunchKernel(measure<Format, kVeryFew>, blocks, threads, arguments, 0, stream);
    if (job.k <= kFew) return cudaLaunchKernel(measure<Format, kFew>, blocks, threads, arguments, 0, stream);
    return cudaLaunchKernel(measure<Format, kMostTopCuda>, blocks, threads, arguments, 0, stream);
}

// As many parts as the processors of the current device take at once; negative: CUDA refused to say.
std::int64_t parts_per_image(std::int64_t images, std::int64_t values_per_image) {
    int device = 0, processors = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return -1;
    const std::int64_t wanted = std::int64_t{processors} * kPartsPerProcessor / images;
    return std::max<std::int64_t>(1, std::min(wanted, values_per_image / kSmallestPart));
}

}  // namespace

std::int64_t scratch_size_cuda(std::int64_t images, std::int64_t values_per_image) noexcept {
    if (images < 1) return 0;
    const std::int64_t parts = parts_per_image(images, values_per_image);
    if (parts < 0) return -1;
    return images *
           (parts * static_cast<std::int64_t>(sizeof(Part)) + static_cast<std::int64_t>(sizeof(unsigned)));
}

Status magnitudes_cuda(const Activations& activations, std::int64_t k, const Magnitudes& out, void* scratch,
                       void* stream) noexcept {
    if (activations.images < 0 || activations.image_stride < 0 || k < 1 || k > kMostTopCuda ||
        k > activations.values_per_image || activations.values_per_image > kLargestPosition)
        return Status::bad_size;
    if (activations.images == 0) return Status::ok;
    const std::int64_t parts = parts_per_image(activations.images, activations.values_per_image);
    if (parts < 0) return Status::launch_failed;
    auto* all_parts = static_cast<Part*>(scratch);
    auto* finished = reinterpret_cast<unsigned*>(all_parts + activations.images * parts);
    const auto on = static_cast<cudaStream_t>(stream);
    const std::size_t bytes = static_cast<std::size_t>(activations.images) * sizeof(unsigned);
    if (cudaMemsetAsync(finished, 0, bytes, on) != cudaSuccess) return Status::launch_failed;
    Job job{activations, k, out, all_parts, finished, static_cast<int>(parts)};
    cudaError_t error = cudaErrorInvalidValue;
    switch (activations.dtype) {
        case Dtype::float32:
            error = launch<Float32>(job, on);
            break;
        case Dtype::float16:
            error = launch<Float16>(job, on);
            break;
        case Dtype::bfloat16:
            error = launch<BFloat16>(job, on);
            break;
    }
    return error == cudaSuccess ? Status::ok : Status::launch_failed;
}

}  // namespace activemark
