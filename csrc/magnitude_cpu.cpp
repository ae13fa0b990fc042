#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <system_error>
#include <thread>

#include "magnitude.hpp"
#include "magnitude_scan.hpp"

namespace activemark {
namespace {

constexpr int kMaxThreads = 64;
constexpr std::int64_t kBytesPerThread = 1 << 19;  // less is not worth starting a thread for

// The grid is laid over what a sample says of the median, three standard errors on either side. Neighbours
// are sampled together, for they come in one cache line.
constexpr int kPlaces = 64;
constexpr int kNeighbours = 8;
constexpr int kSample = kPlaces * kNeighbours;
constexpr int kThreeErrors = 34;  // ranks

// The cells of an image fill whole blocks.
std::int64_t cells_size(std::int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

std::int8_t cell_of(std::int32_t key, Grid grid) {
    return static_cast<std::int8_t>(std::clamp((key - grid.origin) >> grid.shift, kFirstCell, kLastCell));
}

void count_portable(const std::int8_t* cells, int blocks, Steps steps, Scan& scan, const char*) {
    std::fill_n(scan.below, kSteps, 0);
    for (int i = 0; i < blocks * kBlock; ++i)
        for (int step = 0; step < kSteps; ++step) scan.below[step] += cells[i] < steps.cells[step];
}

template <typename Format>
void measure_portable(const typename Format::Bits* x, int blocks, Grid grid, std::int8_t* cells, Scan& scan,
                      const char*) {
    scan.squares = 0;
    for (int block = 0; block < blocks; ++block) {
        std::int32_t largest = 0;
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i) {
            const std::int32_t key = key_of<Format>(x[i]);
            const double value = value_of(key, Format());
            largest = std::max(largest, key);
            scan.squares += value * value;
            cells[i] = cell_of(key, grid);
        }
        scan.largest[block] = largest;
    }
    count_portable(cells, blocks, grid.steps, scan, nullptr);
}

template <typename Format>
Scanner<Format> scanner(Instructions instructions) {
#ifdef ACTIVEMARK_X86
    if (instructions == Instructions::avx512) return scanner_avx512<Format>();
    if (instructions == Instructions::avx2) return scanner_avx2<Format>();
#endif
    static_cast<void>(instructions);
    return {measure_portable<Format>, count_portable};
}

// The k largest values of an image: a heap of positions whose front is the one to be dropped next.
template <typename Format>
class Top {
 public:
    using Bits = typename Format::Bits;

    // At least k values must have a key of `floor` or more, unless it is 0.
    Top(const Bits* x, std::int64_t k, std::int64_t* index, std::int32_t floor)
        : x_(x), k_(k), index_(index), threshold_(floor - 1) {}

    // Positions come in rising order, so only a larger key can displace one.
    std::int32_t threshold() const { return threshold_; }

    void offer(std::int64_t position) {
        if (found_ == k_) {
            std::pop_heap(index_, index_ + k_, Before{x_});
            index_[k_ - 1] = position;
        } else {
            index_[found_++] = position;
        }
        std::push_heap(index_, index_ + found_, Before{x_});
        if (found_ == k_) threshold_ = key_of<Format>(x_[index_[0]]);
    }

    // Orders the positions and returns how many there are.
    std::int64_t finish() {
        std::sort_heap(index_, index_ + found_, Before{x_});
        return found_;
    }

 private:
    struct Before {
        const Bits* x;
        bool operator()(std::int64_t a, std::int64_t b) const {
            const std::int32_t key_a = key_of<Format>(x[a]), key_b = key_of<Format>(x[b]);
            return key_a != key_b ? key_a > key_b : a < b;
        }
    };

    const Bits* x_;
    std::int64_t k_;
    std::int64_t* index_;
    std::int64_t found_ = 0;
    std::int32_t threshold_;
};

// The search for the cell where a rank (from 0) falls: it is one of low ... high - 1.
class Search {
 public:
    Search(std::int64_t rank, std::int64_t count) : rank_(rank), before_high_(count) {}

    int low() const { return low_; }
    int high() const { return high_; }

    void learn(Steps steps, const std::int64_t* below) {
        for (int i = 0; i < kSteps; ++i) {
            const int step = steps.cells[i];
            if (below[i] <= rank_ && step > low_) {
                low_ = step, before_low_ = below[i];
            } else if (below[i] > rank_ && step < high_) {
                high_ = step, before_high_ = below[i];
            }
        }
    }

    // Where to count next: around where the rank falls if values are spread evenly, and every other time all
    // over.
    Steps next() {
        spread_ = !spread_;
        const int width = high_ - low_;
        const auto within = [&](int step) {
            return static_cast<std::int8_t>(std::clamp(step, low_ + 1, std::min(high_, kLastCell)));
        };
        if (spread_) {
            const double share = (static_cast<double>(rank_ - before_low_) + 0.5) /
                                 static_cast<double>(before_high_ - before_low_);
            const int guess = low_ + static_cast<int>(std::lround(share * width));
            return {{within(guess - 1), within(guess), within(guess + 1)}};
        }
        return {{within(low_ + width / 4), within(low_ + width / 2), within(high_ - width / 4)}};
    }

 private:
    std::int64_t rank_;
    int low_ = kFirstCell;
    int high_ = kLastCell + 1;
    std::int64_t before_low_ = 0;
    std::int64_t before_high_;
    bool spread_ = false;
};

// One image's values, and room for their cells.
template <typename Format>
class Image {
 public:
    using Bits = typename Format::Bits;

    Image(const Bits* x, std::int64_t count, std::int8_t* scratch, const Scanner<Format>& scanner)
        : x_(x),
          count_(count),
          cells_(scratch),
          largest_(reinterpret_cast<std::int32_t*>(scratch + cells_size(count))),
          scanner_(scanner) {}

    // `next` is the image to be measured next, or null.
    void measure(std::int64_t k, float* values, std::int64_t* index, float& median, float& mean_square,
                 std::int64_t& nonfinite, const Image* next) const {
        constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
        double squares = 0;
        const Grid grid = grid_over(sampled_range());
        std::int64_t below[kSteps] = {};
        fill_cells(grid, below, [&](std::int64_t first, int blocks, const Scan& scan) {
            if (*std::max_element(scan.largest, scan.largest + blocks) < Format::kBig) {
                squares += scan.squares;
                std::copy_n(scan.largest, blocks, largest_ + first);
            } else {
                std::fill_n(largest_ + first, blocks, kValueByValue);
            }
        });

        if (next) next->ask_for_sample();
        const std::int64_t blocks = count_ / kBlock;
        Top<Format> top(x_, k, index, floor_of_top(k, index));
        nonfinite = 0;
        const auto take_values = [&](std::int64_t start, std::int64_t end) {
            for (std::int64_t i = start; i < end; ++i) {
                const std::int32_t key = key_of<Format>(x_[i]);
                if (key >= Format::kInfinity) {
                    ++nonfinite;
                    continue;
                }
                const double value = value_of(key, Format());
                squares += value * value;
                if (key > top.threshold()) top.offer(i);
            }
        };
        for (std::int64_t block = 0; block < blocks; ++block) {
            if (largest_[block] <= top.threshold()) continue;
            if (largest_[block] == kValueByValue) {
                take_values(block * kBlock, (block + 1) * kBlock);
            } else {
                offer_block(block * kBlock, top);
            }
        }
        take_values(blocks * kBlock, count_);

        const std::int64_t found = top.finish();
        for (std::int64_t rank = 0; rank < found; ++rank)
            values[rank] = value_of(key_of<Format>(x_[index[rank]]), Format());
        std::fill(values + found, values + k, kNaN);
        std::fill(index + found, index + k, -1);
        const std::int64_t finite = count_ - nonfinite;
        mean_square = static_cast<float>(squares / static_cast<double>(finite));
        median = finite > 0 ? find((finite - 1) / 2, grid, below, next) : kNaN;
    }

 private:
    // A block that may hold NaN, infinities or squares that overflow.
    static constexpr std::int32_t kValueByValue = Format::kMask;

    // The sample is scattered: left until it is read, every place of it would be waited for.
    void ask_for_sample() const {
        if (count_ < kSample) return;
        for (int place = 0; place < kPlaces; ++place) __builtin_prefetch(at_place(place));
    }

    // Multiples of the golden ratio, modulo 1, fall everywhere and in step with no width.
    const Bits* at_place(int place) const {
        const std::uint64_t share = (place * std::uint64_t{0x9e3779b97f4a7c15}) >> 32;
        return x_ + ((share * static_cast<std::uint64_t>(count_ - kNeighbours)) >> 32);
    }

    // A key that k values reach, so that few are offered: of each block, the largest is known. 0 where that
    // tells nothing. `room` is for k numbers.
    std::int32_t floor_of_top(std::int64_t k, std::int64_t* room) const {
        const std::int64_t blocks = count_ / kBlock;
        if (blocks < k) return 0;
        std::partial_sort_copy(largest_, largest_ + blocks, room, room + k, std::greater<>());
        return room[0] == kValueByValue ? 0 : static_cast<std::int32_t>(room[k - 1]);
    }

    // Offers what is larger than the threshold; most parts of a block hold nothing of the kind.
    void offer_block(std::int64_t start, Top<Format>& top) const {
        constexpr int kPart = 32;
        for (std::int64_t part = start; part < start + kBlock; part += kPart) {
            std::int32_t largest = 0;
            for (int i = 0; i < kPart; ++i) largest = std::max(largest, key_of<Format>(x_[part + i]));
            if (largest <= top.threshold()) continue;
            for (std::int64_t i = part; i < part + kPart; ++i)
                if (key_of<Format>(x_[i]) > top.threshold()) top.offer(i);
        }
    }

    // Writes all cells, counts those before the grid's steps, and hands what was found in some blocks to
    // `take`.
    template <typename Take>
    void fill_cells(Grid grid, std::int64_t* below, Take take) const {
        Scan scan;
        std::int64_t start = 0;
        for (; count_ - start >= kBlock;) {
            const int blocks = static_cast<int>(std::min<std::int64_t>((count_ - start) / kBlock, kBlocks));
            const char* ahead =
                reinterpret_cast<const char*>(x_) + count_ / 64 * kAhead + start / 64 * kAheadPerValues<Bits>;
            scanner_.measure(x_ + start, blocks, grid, cells_ + start, scan, ahead);
            for (int i = 0; i < kSteps; ++i) below[i] += scan.below[i];
            take(start / kBlock, blocks, scan);
            start += blocks * kBlock;
        }
        if (start == count_) return;
        // The rest is filled up with cells that come before no step.
        std::fill_n(cells_ + start, kBlock, static_cast<std::int8_t>(kLastCell));
        for (std::int64_t i = start; i < count_; ++i) cells_[i] = cell_of(key_of<Format>(x_[i]), grid);
        count_portable(cells_ + start, 1, grid.steps, scan, nullptr);
        for (int i = 0; i < kSteps; ++i) below[i] += scan.below[i];
    }

    // `ahead`: what to ask for meanwhile.
    void count_cells(Steps steps, std::int64_t* below, const char* ahead) const {
        Scan scan;
        const std::int64_t all = (count_ + kBlock - 1) / kBlock;
        for (std::int64_t block = 0; block < all; block += kBlocks) {
            const int blocks = static_cast<int>(std::min<std::int64_t>(all - block, kBlocks));
            scanner_.count(cells_ + block * kBlock, blocks, steps, scan,
                           ahead + block * kBlock / 64 * kAhead);
            for (int i = 0; i < kSteps; ++i) below[i] += scan.below[i];
        }
    }

    // The keys among which the median probably is.
    KeyRange sampled_range() const {
        if (count_ < kSample) return {0, Format::kInfinity - 1};
        // The 15 highest bits of a key are enough here, and short numbers are compared faster.
        constexpr int kDropped = 8 * (sizeof(Bits) - sizeof(std::int16_t));
        std::int16_t sample[kSample];
        for (int place = 0; place < kPlaces; ++place) {
            const Bits* at = at_place(place);
            for (int i = 0; i < kNeighbours; ++i)
                sample[place * kNeighbours + i] =
                    static_cast<std::int16_t>(key_of<Format>(at[i]) >> kDropped);
        }
        const std::int32_t first = of_rank(sample, kSample / 2 - kThreeErrors) << kDropped;
        const std::int32_t last =
            (of_rank(sample, kSample / 2 + kThreeErrors) << kDropped) | ((1 << kDropped) - 1);
        return {std::min(first, Format::kInfinity - 1), std::min(last, Format::kInfinity - 1)};
    }

    // The number of this rank in the sample, by bisection: a processor counts faster than it sorts.
    static std::int32_t of_rank(const std::int16_t* sample, int rank) {
        std::int16_t found = 0;
        for (int bit = 1 << 14; bit > 0; bit >>= 1) {
            const auto candidate = static_cast<std::int16_t>(found + bit);
            std::int16_t below = 0;
            for (int i = 0; i < kSample; ++i) below += sample[i] < candidate;
            if (below <= rank) found = candidate;
        }
        return found;
    }

    // The range lies within the grid, its first and last cell left out; no cell is finer than it has to be.
    static Grid grid_over(KeyRange range) {
        const std::int32_t width = range.last - range.first;
        int shift = 0;
        while (width >> shift > kLastCell - kFirstCell - 4 ||
               close_enough<Format>({range.first, range.first + (2 << shift) - 1}))
            ++shift;
        const auto half = static_cast<std::int8_t>((width >> shift) / 2 + 1);
        return {range.first + width / 2, shift, {{static_cast<std::int8_t>(-half), 0, half}}};
    }

    static KeyRange keys_of(const Search& search, Grid grid) {
        const auto start = [&](int cell) {
            return grid.origin + static_cast<std::int64_t>(cell) * (std::int64_t{1} << grid.shift);
        };
        const std::int64_t first = search.low() == kFirstCell ? 0 : start(search.low());
        const std::int64_t last = search.high() > kLastCell ? Format::kInfinity : start(search.high());
        return {static_cast<std::int32_t>(std::max<std::int64_t>(first, 0)),
                static_cast<std::int32_t>(std::min<std::int64_t>(last, Format::kInfinity) - 1)};
    }

    // The median's value: its rank, and what the first pass counted on the first grid. Where that grid missed
    // it or is too coarse, the image is read again, with a grid over what is left.
    float find(std::int64_t rank, Grid grid, const std::int64_t* counted, const Image* next) const {
        std::int64_t below[kSteps];
        // Once is enough; where cells are counted again, they are themselves what is asked for.
        const char* ahead = reinterpret_cast<const char*>(next ? static_cast<const void*>(next->x_) : cells_);
        std::copy_n(counted, kSteps, below);
        while (true) {
            Search search(rank, count_);
            search.learn(grid.steps, below);
            KeyRange keys = keys_of(search, grid);
            while (!close_enough<Format>(keys) && search.high() - search.low() > 1) {
                const Steps steps = search.next();
                std::fill_n(below, kSteps, 0);
                count_cells(steps, below, ahead);
                ahead = reinterpret_cast<const char*>(cells_);
                search.learn(steps, below);
                keys = keys_of(search, grid);
            }
            if (close_enough<Format>(keys)) return middle_of<Format>(keys);
            grid = grid_over(keys);
            std::fill_n(below, kSteps, 0);
            fill_cells(grid, below, [](std::int64_t, int, const Scan&) {});
        }
    }

    const Bits* x_;
    std::int64_t count_;
    std::int8_t* cells_;
    std::int32_t* largest_;  // of each block: its largest key, or kValueByValue
    const Scanner<Format>& scanner_;
};

// Threads, the caller one of them, take image after image.
template <typename Format>
void measure(const Activations& in, std::int64_t k, const Magnitudes& out, std::int8_t* scratch, int threads,
             Instructions instructions) {
    const Scanner<Format> chosen = scanner<Format>(instructions);
    const auto* x = static_cast<const typename Format::Bits*>(in.x);
    std::atomic<std::int64_t> untaken{0};
    const auto measure_some = [&](std::int64_t part) {
        std::int8_t* own = scratch + part * scratch_size(in.values_per_image, 1);
        const auto image = [&](std::int64_t i) {
            return Image<Format>(x + i * in.image_stride, in.values_per_image, own, chosen);
        };
        // An image is taken before the one before it is measured, which asks for its sample.
        for (std::int64_t i = untaken++; i < in.images;) {
            const std::int64_t next = untaken++;
            const Image<Format> coming = image(std::min(next, in.images - 1));
            image(i).measure(k, out.values + i * k, out.index + i * k, out.median[i], out.mean_square[i],
                             out.nonfinite[i], next < in.images ? &coming : nullptr);
            i = next;
        }
    };
    const std::int64_t bytes =
        in.images * in.values_per_image * static_cast<std::int64_t>(sizeof(typename Format::Bits));
    const std::int64_t parts =
        std::min({in.images, bytes / kBytesPerThread, std::int64_t{threads}, std::int64_t{kMaxThreads}});
    std::thread helpers[kMaxThreads];
    for (std::int64_t part = 1; part < parts; ++part) {
        try {
            helpers[part] = std::thread(measure_some, part);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the others do the rest
        }
    }
    measure_some(0);
    for (std::thread& helper : helpers)
        if (helper.joinable()) helper.join();
}

}  // namespace

Instructions best_instructions() noexcept {
#ifdef ACTIVEMARK_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return Instructions::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return Instructions::avx2;
#endif
    return Instructions::portable;
}

std::int64_t scratch_size(std::int64_t values_per_image, int threads) noexcept {
    const std::int64_t cells = cells_size(values_per_image);
    return (cells + cells / kBlock * static_cast<std::int64_t>(sizeof(std::int32_t))) *
           std::min(threads, kMaxThreads);
}

Status magnitudes_cpu(const Activations& activations, std::int64_t k, const Magnitudes& out,
                      std::int8_t* scratch, int threads, Instructions instructions) noexcept {
    if (activations.images < 0 || activations.image_stride < 0 || k < 1 || k > activations.values_per_image ||
        threads < 1)
        return Status::bad_size;
    if (instructions > best_instructions()) return Status::unsupported;
    switch (activations.dtype) {
        case Dtype::float32:
            measure<Float32>(activations, k, out, scratch, threads, instructions);
            break;
        case Dtype::float16:
            measure<Float16>(activations, k, out, scratch, threads, instructions);
            break;
        case Dtype::bfloat16:
            measure<BFloat16>(activations, k, out, scratch, threads, instructions);
            break;
    }
    return Status::ok;
}

}  // namespace activemark
