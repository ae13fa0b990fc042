// One kernel an activation. Several thread blocks share an image, each a part of it; the last of them to
// finish puts the parts together. As on the CPU the median is found by counting in a grid over what a sample
// says of it; where the grid missed it, the last block reads its image again.
//
// While a part is read a value costs some seven instructions, and those decide: 16-bit values go two at a
// time through most of them, every value is counted somewhere rather than some behind a branch, and of the
// largest a thread keeps but one for each chunk of its values. Those tell which few chunks are to be read
// again, for the k largest of the part.
//
// Nothing here is CUB's. Its device-wide sort, scan and reduction are launches of their own, each of which
// reads the activation from memory once more; this reads it once, in one launch. Its warp and block
// primitives could take the place of the sums, the scan in `bin_of_rank` and the sort of a sample, which run
// once a part, not once a value; that was not measured, and the tests, which compile this file for the CPU
// (tests/ops/cuda_on_cpu), could no longer do so.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cuda/atomic>

#include "magnitude.hpp"
#include "magnitude_keys.hpp"

namespace activemark {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBins = 510;
constexpr int kCounts = kBins + 2;  // what is below the bins, the bins, what is above
constexpr int kCountsPerThread = kCounts / kThreads;
constexpr std::int64_t kSmallestPart = 8192;
constexpr int kPartsPerProcessor = 2;  // as many blocks as its registers have room for
constexpr int kSteps = 4;              // loads of 16 bytes that a thread has under way
constexpr int kChunks = 8;             // in which a thread keeps its largest key apart
// Ranks among a warp's part of the sample, between whose keys the median is sought. Over eight warps their
// mean is four standard errors from the median: of 64 images, reading one again takes as long as all the
// rest.
constexpr int kLowRank = 11, kHighRank = 20;
constexpr int kNeighbours = 2;

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

// Bins of 2^shift keys, from `first` on. Bin 0 is for all keys below, bins + 1 for those above.
struct Grid {
    std::int32_t first;
    int shift;
    int bins;

    __device__ int bin_of(std::int32_t key) const {
        return key < first ? 0 : min((key - first) >> shift, bins) + 1;
    }
};

__device__ Grid grid_over(KeyRange range) {
    int shift = 0;
    while ((range.last - range.first) >> shift >= kBins) ++shift;
    return {range.first, shift, ((range.last - range.first) >> shift) + 1};
}

// What one part leaves for the block that puts them together.
struct Part {
    double squares;
    unsigned nonfinite;
    unsigned counts[kCounts];
};

struct Job {
    Activations in;
    int k;
    Magnitudes out;
    Part* parts;         // images * parts_per_image
    Ranked* tops;        // images * parts_per_image * k
    unsigned* finished;  // of each image, zeros
    int parts_per_image;
    std::int64_t part;  // values of each but the last
};

// What the threads of a block share.
struct Shared {
    unsigned counts[kCounts];
    unsigned nonfinite;
    std::int32_t low[kWarps], high[kWarps];
    std::int32_t largest[kChunks][kThreads];  // of a chunk of a thread's values, the largest finite key
    unsigned short chosen[kChunks * kThreads];
    unsigned chunks;
    std::int32_t threshold;
    unsigned candidates;
    Ranked candidate[kThreads];
    Ranked top[kMaxTopCuda];
    unsigned keys[kWarps + kMaxTopCuda];
    double sums[kWarps];
    unsigned of_warps[kWarps];
    int found;
    bool last;
};

__device__ float signed_value(std::uint16_t bits, Float16) { return __half2float(__ushort_as_half(bits)); }
__device__ float signed_value(std::uint16_t bits, BFloat16) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// A 32-bit word of values: one, or two of 16 bits that most instructions take together.
template <typename Format, int kBytes = sizeof(typename Format::Bits)>
struct Word;

template <typename Format>
struct Word<Format, 4> {
    static constexpr int kValues = 1;
    static __device__ unsigned keys_of(unsigned word) { return word & Format::kMask; }
    static __device__ std::int32_t key(unsigned keys, int) { return static_cast<std::int32_t>(keys); }
    static __device__ float value(unsigned word, int) { return __uint_as_float(word); }
    static __device__ unsigned larger(unsigned a, unsigned b) { return max(a, b); }
    // Each key plus `more`, but at least 0 and at most `limit`.
    static __device__ unsigned within(unsigned keys, std::int32_t more, std::int32_t limit) {
        return static_cast<unsigned>(__viaddmin_s32_relu(static_cast<std::int32_t>(keys), more, limit));
    }
    static __device__ unsigned shifted(unsigned within, int, int shift) { return within >> shift; }
};

template <typename Format>
struct Word<Format, 2> {
    static constexpr int kValues = 2;
    static constexpr unsigned kBoth = 0x10001;
    static __device__ unsigned keys_of(unsigned word) { return word & Format::kMask * kBoth; }
    static __device__ std::int32_t key(unsigned keys, int value) {
        return static_cast<std::int32_t>(keys >> value * 16 & 0xffffu);
    }
    static __device__ float value(unsigned word, int value) {
        return signed_value(static_cast<std::uint16_t>(word >> value * 16), Format());
    }
    static __device__ unsigned larger(unsigned a, unsigned b) { return __vmaxu2(a, b); }
    static __device__ unsigned within(unsigned keys, std::int32_t more, std::int32_t limit) {
        return __viaddmin_s16x2_relu(keys, (static_cast<unsigned>(more) & 0xffffu) * kBoth,
                                     static_cast<unsigned>(limit) * kBoth);
    }
    static __device__ unsigned shifted(unsigned within, int value, int shift) {
        return value == 1 ? within >> (16 + shift) : (within & 0xffffu) >> shift;
    }
};

template <typename Format>
__device__ std::int32_t largest_of(unsigned keys) {
    const std::int32_t first = Word<Format>::key(keys, 0);
    return max(first, Word<Format>::key(keys, Word<Format>::kValues - 1));
}

// Leaves the sum of each warp's values, in a fixed order, for `sum_of_block` after a barrier.
__device__ void leave_sum(double value, Shared& shared) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(kAllLanes, value, distance);
    if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = value;
}

__device__ double sum_of_block(const Shared& shared) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp];
    return sum;
}

// Adds a count of each thread to `total` (shared), once a warp.
__device__ void add_counts(unsigned count, unsigned* total) {
    count = __reduce_add_sync(kAllLanes, count);
    if (threadIdx.x % kWarp == 0) atomicAdd(total, count);
}

// A key that k of the threads' keys reach, at least; -1 where fewer have one (none is -1). All threads must
// call.
__device__ std::int32_t reached(std::int32_t key, int k, Shared& shared) {
    // Each warp names so many that there are k of them; more would only make it a little larger.
    const int named = (k + kWarps - 1) / kWarps;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    unsigned mine = static_cast<unsigned>(key + 1);
    for (int i = 0; i < named; ++i) {
        const unsigned largest = __reduce_max_sync(kAllLanes, mine);
        const unsigned holders = __ballot_sync(kAllLanes, mine == largest);
        if (lane == __ffs(static_cast<int>(holders)) - 1) {
            shared.keys[warp * named + i] = largest;
            mine = 0;
        }
    }
    __syncthreads();
    const int all = kWarps * named, thread = static_cast<int>(threadIdx.x);
    if (thread < all) {
        const unsigned one = shared.keys[thread];
        int before = 0;
        for (int i = 0; i < all; ++i) before += shared.keys[i] > one || (shared.keys[i] == one && i < thread);
        if (before == k - 1) shared.threshold = static_cast<std::int32_t>(one) - 1;
    }
    __syncthreads();
    return shared.threshold;
}

// The largest entry of all threads, to all of them; all must call.
__device__ Ranked largest_of_block(Ranked entry, Shared& shared) {
    const unsigned key = static_cast<unsigned>(entry >> 32);
    const unsigned largest = __reduce_max_sync(kAllLanes, key);
    const unsigned low = key == largest ? static_cast<unsigned>(entry) : 0;
    const unsigned lowest = __reduce_max_sync(kAllLanes, low);
    if (threadIdx.x % kWarp == 0)
        shared.candidate[threadIdx.x / kWarp] = static_cast<Ranked>(largest) << 32 | lowest;
    __syncthreads();
    Ranked best = kNothing;
    for (int warp = 0; warp < kWarps; ++warp) best = max(best, shared.candidate[warp]);
    __syncthreads();
    return best;
}

// The k largest entries in descending order, in shared.top, and kNothing for what is lacking. `offer` calls
// its argument with each of the entries that this thread has to offer. All threads must call.
template <typename Offer>
__device__ void rank_top(int k, Offer offer, Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    offer([&](Ranked entry) {
        const unsigned place = atomicAdd(&shared.candidates, 1u);
        if (place < kThreads) shared.candidate[place] = entry;
    });
    if (thread < k) shared.top[thread] = kNothing;
    __syncthreads();
    const int candidates = static_cast<int>(min(shared.candidates, kThreads + 1u));
    if (candidates <= kThreads) {
        if (thread < candidates) {
            const Ranked mine = shared.candidate[thread];
            int larger = 0;
            for (int i = 0; i < candidates; ++i) larger += shared.candidate[i] > mine;
            if (larger < k) shared.top[larger] = mine;
        }
        __syncthreads();
        return;
    }
    // So many are equal, or with one thread: then one after the other.
    Ranked last = ~Ranked{0};
    for (int rank = 0; rank < k; ++rank) {
        Ranked best = kNothing;
        offer([&](Ranked entry) {
            if (entry < last) best = max(best, entry);
        });
        last = largest_of_block(best, shared);
        if (thread == 0) shared.top[rank] = last;
    }
    __syncthreads();
}

// Where the median of an image probably is, the same for all its parts: from a sample.
template <typename Format>
__device__ KeyRange range_of_median(const typename Format::Bits* x, std::int64_t count, Shared& shared) {
    const KeyRange everything{0, Format::kInfinity - 1};
    if (count < kSmallestPart) return everything;  // in more than that no value is sampled twice
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    // Multiples of the golden ratio, modulo 1, fall everywhere and in step with no width.
    const std::uint64_t share = ((thread / kNeighbours) * std::uint64_t{0x9e3779b97f4a7c15}) >> 32;
    const std::uint64_t place = (share * static_cast<std::uint64_t>(count - kNeighbours)) >> 32;
    std::int32_t key = key_of<Format>(x[place + thread % kNeighbours]);
    // A bitonic sort of the warp's.
#pragma unroll
    for (int size = 2; size <= kWarp; size *= 2) {
#pragma unroll
        for (int stride = size / 2; stride > 0; stride /= 2) {
            const std::int32_t other = __shfl_xor_sync(kAllLanes, key, stride);
            const bool smaller = ((lane & stride) == 0) == ((lane & size) == 0);
            key = smaller ? min(key, other) : max(key, other);
        }
    }
    if (lane == kLowRank) shared.low[warp] = key;
    if (lane == kHighRank) shared.high[warp] = key;
    __syncthreads();
    std::int64_t low = 0, high = 0;
    bool finite = true;
    for (int i = 0; i < kWarps; ++i) {
        low += shared.low[i];
        high += shared.high[i];
        finite = finite && shared.high[i] < Format::kInfinity;
    }
    if (!finite) return everything;
    return {static_cast<std::int32_t>(low / kWarps), static_cast<std::int32_t>(high / kWarps)};
}

// The bin where a rank falls, by shared.counts; all threads must call.
__device__ int bin_of_rank(unsigned rank, Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x), start = thread * kCountsPerThread;
    unsigned mine = 0;
    for (int i = 0; i < kCountsPerThread; ++i) mine += shared.counts[start + i];
    unsigned up_to = mine;  // and with, of the warp
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const unsigned lower = __shfl_up_sync(kAllLanes, up_to, distance);
        if (thread % kWarp >= distance) up_to += lower;
    }
    if (thread % kWarp == kWarp - 1) shared.of_warps[thread / kWarp] = up_to;
    __syncthreads();
    unsigned before = up_to - mine;
    for (int warp = 0; warp < thread / kWarp; ++warp) before += shared.of_warps[warp];
    if (before <= rank && rank < before + mine) {
        unsigned left = rank - before;
        int bin = start;
        while (left >= shared.counts[bin]) left -= shared.counts[bin++];
        shared.found = bin;
    }
    __syncthreads();
    return shared.found;
}

// The value of a rank (from 0) among the finite ones, all of which are counted in shared.counts.
template <typename Format>
__device__ float find(const typename Format::Bits* x, std::int64_t count, Grid grid, unsigned rank,
                      Shared& shared) {
    while (true) {
        const int bin = bin_of_rank(rank, shared);
        const std::int32_t first = grid.first + (bin - 1) * (1 << grid.shift);
        const std::int32_t next = grid.first + bin * (1 << grid.shift);
        KeyRange range{first, min(next, Format::kInfinity) - 1};
        if (bin == 0) range = {0, grid.first - 1};
        if (bin == grid.bins + 1) range = {first, Format::kInfinity - 1};
        if (close_enough<Format>(range)) return middle_of<Format>(range);
        grid = grid_over(range);
        __syncthreads();
        for (int i = threadIdx.x; i < kCounts; i += kThreads) shared.counts[i] = 0;
        __syncthreads();
        for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
            const std::int32_t key = key_of<Format>(x[i]);
            if (key < Format::kInfinity) atomicAdd(&shared.counts[grid.bin_of(key)], 1u);
        }
        __syncthreads();
    }
}

// The results of an image whose parts are all there. All threads of its last block call.
template <typename Format>
__device__ void put_together(const Job& job, std::int64_t image, const typename Format::Bits* x, Grid grid,
                             Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const Part* parts = job.parts + image * job.parts_per_image;
    const Ranked* tops = job.tops + image * job.parts_per_image * job.k;
    // All that comes from memory is asked for before any of it is used.
    const int entries = job.parts_per_image * job.k;
    const bool has_part = thread < job.parts_per_image;
    const Ranked entry = thread < entries ? tops[thread] : kNothing;
    double squares = has_part ? parts[thread].squares : 0;
    unsigned nonfinite = has_part ? parts[thread].nonfinite : 0;
    constexpr int kAtATime = 8;
    unsigned counts[kCountsPerThread] = {};
    for (int first = 0; first < job.parts_per_image; first += kAtATime) {
        unsigned of_part[kAtATime][kCountsPerThread];
#pragma unroll
        for (int j = 0; j < kAtATime; ++j)
#pragma unroll
            for (int i = 0; i < kCountsPerThread; ++i)
                of_part[j][i] =
                    first + j < job.parts_per_image ? parts[first + j].counts[i * kThreads + thread] : 0;
#pragma unroll
        for (int j = 0; j < kAtATime; ++j)
#pragma unroll
            for (int i = 0; i < kCountsPerThread; ++i) counts[i] += of_part[j][i];
    }
#pragma unroll
    for (int i = 0; i < kCountsPerThread; ++i) shared.counts[i * kThreads + thread] = counts[i];
    for (int part = thread + kThreads; part < job.parts_per_image; part += kThreads) {
        squares += parts[part].squares;
        nonfinite += parts[part].nonfinite;
    }
    std::int32_t largest = entry == kNothing ? -1 : key_of_ranked(entry);
    for (int i = thread + kThreads; i < entries; i += kThreads)
        if (tops[i] != kNothing) largest = max(largest, key_of_ranked(tops[i]));
    // The barriers that these need are in `reached`.
    leave_sum(squares, shared);
    add_counts(nonfinite, &shared.nonfinite);
    const std::int32_t threshold = reached(largest, job.k, shared);
    rank_top(
        job.k,
        [&](auto take) {
            if (entry != kNothing && key_of_ranked(entry) >= threshold) take(entry);
            for (int i = thread + kThreads; i < entries; i += kThreads)
                if (tops[i] != kNothing && key_of_ranked(tops[i]) >= threshold) take(tops[i]);
        },
        shared);

    const float nan = as_float(0x7fc00000);
    for (int rank = thread; rank < job.k; rank += kThreads) {
        const Ranked best = shared.top[rank];
        job.out.values[image * job.k + rank] =
            best == kNothing ? nan : value_of(key_of_ranked(best), Format());
        job.out.index[image * job.k + rank] = best == kNothing ? -1 : position_of_ranked(best);
    }
    const unsigned all_nonfinite = shared.nonfinite;
    const std::int64_t count = job.in.values_per_image;
    const unsigned finite = static_cast<unsigned>(count) - all_nonfinite;
    float median = nan;
    if (finite > 0) median = find<Format>(x, count, grid, (finite - 1) / 2, shared);
    if (thread == 0) {
        job.out.nonfinite[image] = static_cast<std::int64_t>(all_nonfinite);
        job.out.mean_square[image] = static_cast<float>(sum_of_block(shared) / static_cast<double>(finite));
        job.out.median[image] = median;
    }
}

template <typename Format>
__global__ void __launch_bounds__(kThreads, kPartsPerProcessor) measure(Job job) {
    using Bits = typename Format::Bits;
    using Keys = Word<Format>;
    constexpr int kWords = 4, kLanes = kWords * Keys::kValues;  // of a load
    __shared__ Shared shared;
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t image = blockIdx.x / job.parts_per_image;
    const unsigned part_number = blockIdx.x % job.parts_per_image;
    const std::int64_t count = job.in.values_per_image;
    const auto* x = static_cast<const Bits*>(job.in.x) + image * job.in.image_stride;
    const std::int64_t start = job.part * part_number;
    const std::int64_t end = min(count, start + job.part);

    // The part is read 16 bytes at a time; fewer come before the first of these loads and after the last.
    const int misplaced =
        static_cast<int>(reinterpret_cast<std::uintptr_t>(x + start) / sizeof(Bits) % kLanes);
    const std::int64_t head = start + (kLanes - misplaced) % kLanes;
    const std::int64_t aligned = head < end ? head : end;
    const int loads = static_cast<int>((end - aligned) / kLanes);
    const uint4* vector = reinterpret_cast<const uint4*>(x + aligned);
    uint4 next[kSteps];  // on their way while the last are counted; zeros past the end
    const auto fetch = [&](int i) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            next[step] = {};
            if (i + step * kThreads < loads) next[step] = vector[i + step * kThreads];
        }
    };
    fetch(thread);
    for (int i = thread; i < kCounts; i += kThreads) shared.counts[i] = 0;
    if (thread == 0) shared.nonfinite = shared.chunks = shared.candidates = 0;
    const Grid grid = grid_over(range_of_median<Format>(x, count, shared));
    __syncthreads();

    float squares = 0;
    double all_squares = 0;
    unsigned nonfinite = 0;
    // Counts a value by itself. Returns its key, or -1 where it is not finite.
    const auto count_one = [&](std::int32_t key) {
        if (key >= Format::kInfinity) {
            ++nonfinite;
            return -1;
        }
        const double value = value_of(key, Format());
        all_squares += value * value;
        atomicAdd(&shared.counts[grid.bin_of(key)], 1u);
        return key;
    };

    // Of the values before the first load and after the last, the one that is this thread's, or -1.
    std::int64_t edge = start + thread;
    if (edge >= aligned) edge += std::int64_t{loads} * kLanes;
    if (edge >= end) edge = -1;
    std::int32_t edge_key = -1;
    if (edge >= 0) edge_key = count_one(key_of<Format>(x[edge]));

    constexpr int kGroup = kSteps * kThreads;
    const int chunk = (loads + kChunks * kGroup - 1) / (kChunks * kGroup) * kGroup;
    const std::int32_t more = (1 << grid.shift) - grid.first, limit = (grid.bins + 1) << grid.shift;
    std::int32_t largest = edge_key;
    for (int c = 0; c < kChunks; ++c) {
        const int chunk_end = min(loads, (c + 1) * chunk);
        unsigned most = 0;
        for (int i = c * chunk + thread; i < chunk_end; i += kGroup) {
            unsigned words[kSteps][kWords];
            unsigned most_here = 0;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                words[step][0] = next[step].x;
                words[step][1] = next[step].y;
                words[step][2] = next[step].z;
                words[step][3] = next[step].w;
            }
            fetch(i + kGroup);
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
#pragma unroll
                for (int word = 0; word < kWords; ++word)
                    most_here = Keys::larger(most_here, Keys::keys_of(words[step][word]));
            if (largest_of<Format>(most_here) >= Format::kBig) {  // squares too large, or not finite
                for (int j = 0; j < kSteps * kLanes; ++j) {
                    const std::int64_t load = i + j / kLanes * kThreads;
                    if (load >= chunk_end) break;
                    const std::int32_t key =
                        count_one(key_of<Format>(x[aligned + load * kLanes + j % kLanes]));
                    if (key >= 0) most = Keys::larger(most, static_cast<unsigned>(key));
                }
                continue;
            }
            most = Keys::larger(most, most_here);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                if (i + step * kThreads >= chunk_end) break;
#pragma unroll
                for (int word = 0; word < kWords; ++word) {
                    const unsigned within = Keys::within(Keys::keys_of(words[step][word]), more, limit);
#pragma unroll
                    for (int value = 0; value < Keys::kValues; ++value) {
                        const float number = Keys::value(words[step][word], value);
                        squares += number * number;
                        atomicAdd(&shared.counts[Keys::shifted(within, value, grid.shift)], 1u);
                    }
                }
            }
        }
        all_squares += static_cast<double>(squares);
        squares = 0;
        const std::int32_t of_chunk = largest_of<Format>(most);
        shared.largest[c][thread] = of_chunk;
        largest = max(largest, of_chunk);
    }

    leave_sum(all_squares, shared);
    add_counts(nonfinite, &shared.nonfinite);
    const std::int32_t threshold = reached(largest, job.k, shared);
    if (largest >= threshold)
        for (int c = 0; c < kChunks; ++c)
            if (shared.largest[c][thread] >= threshold)
                shared.chosen[atomicAdd(&shared.chunks, 1u)] =
                    static_cast<unsigned short>(c * kThreads + thread);
    __syncthreads();
    const int per_chunk = chunk / kThreads, tasks = static_cast<int>(shared.chunks) * per_chunk;
    rank_top(
        job.k,
        [&](auto take) {
            if (edge_key >= 0 && edge_key >= threshold) take(ranked(edge_key, edge));
            for (int task = thread; task < tasks; task += kThreads) {
                const int chosen = shared.chosen[task / per_chunk];
                const int i = chosen / kThreads * chunk + task % per_chunk * kThreads + chosen % kThreads;
                if (i >= loads) continue;
                const uint4 loaded = vector[i];
                const unsigned words[kWords] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
                for (int j = 0; j < kLanes; ++j) {
                    const std::int32_t key =
                        Keys::key(Keys::keys_of(words[j / Keys::kValues]), j % Keys::kValues);
                    if (key >= threshold && key < Format::kInfinity)
                        take(ranked(key, aligned + std::int64_t{i} * kLanes + j));
                }
            }
        },
        shared);
    Part& mine = job.parts[blockIdx.x];
    if (thread < job.k) job.tops[std::int64_t{blockIdx.x} * job.k + thread] = shared.top[thread];
    if (thread == 0) {
        mine.squares = sum_of_block(shared);
        mine.nonfinite = shared.nonfinite;
    }
    for (int i = thread; i < kCounts; i += kThreads) mine.counts[i] = shared.counts[i];

    // The last part to come here finds all of them written.
    __syncthreads();
    if (thread == 0) {
        // Releases what the block has written, and acquires what the others have.
        const cuda::atomic_ref<unsigned, cuda::thread_scope_device> finished(job.finished[image]);
        const unsigned before = finished.fetch_add(1, cuda::std::memory_order_acq_rel);
        shared.last = before + 1 == static_cast<unsigned>(job.parts_per_image);
        shared.nonfinite = shared.candidates = 0;
    }
    __syncthreads();
    if (!shared.last) return;
    put_together<Format>(job, image, x, grid, shared);
}

template <typename Format>
cudaError_t launch(Job& job, cudaStream_t stream) {
    void* arguments[] = {&job};
    const dim3 blocks(static_cast<unsigned>(job.in.images * job.parts_per_image)), threads(kThreads);
    return cudaLaunchKernel(measure<Format>, blocks, threads, arguments, 0, stream);
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
    return images * (parts * static_cast<std::int64_t>(sizeof(Part) + kMaxTopCuda * sizeof(Ranked)) +
                     static_cast<std::int64_t>(sizeof(unsigned)));
}

Status magnitudes_cuda(const Activations& activations, std::int64_t k, const Magnitudes& out, void* scratch,
                       void* stream) noexcept {
    if (activations.images < 0 || activations.image_stride < 0 || k < 1 || k > kMaxTopCuda ||
        k > activations.values_per_image || activations.values_per_image > kLargestPosition)
        return Status::bad_size;
    if (activations.images == 0) return Status::ok;
    const std::int64_t parts = parts_per_image(activations.images, activations.values_per_image);
    if (parts < 0) return Status::launch_failed;
    const std::int64_t all = activations.images * parts;
    auto* all_parts = static_cast<Part*>(scratch);
    auto* tops = reinterpret_cast<Ranked*>(all_parts + all);
    auto* finished = reinterpret_cast<unsigned*>(tops + all * kMaxTopCuda);
    const auto on = static_cast<cudaStream_t>(stream);
    const std::size_t bytes = static_cast<std::size_t>(activations.images) * sizeof(unsigned);
    if (cudaMemsetAsync(finished, 0, bytes, on) != cudaSuccess) return Status::launch_failed;
    // A multiple of 8, so that all parts are aligned as the image is.
    const std::int64_t part = ((activations.values_per_image + parts - 1) / parts + 7) / 8 * 8;
    Job job{activations, static_cast<int>(k), out, all_parts, tops, finished, static_cast<int>(parts), part};
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
