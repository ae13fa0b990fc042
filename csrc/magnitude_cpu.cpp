#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>

#include "magnitude.hpp"
#include "magnitude_scan.hpp"

namespace activemark {
namespace {

constexpr int kMostThreads = 64;
constexpr std::int64_t kBytesPerThread = 1 << 19;  // less is not worth starting a thread for

// The grid is laid over what a sample says of the median, three standard errors on either side. Neighbours
// are sampled together, for they come in one cache line.
constexpr int kPlaces = 64;
constexpr int kNeighbours = 8;
constexpr int kSample = kPlaces * kNeighbours;
constexpr int kThreeErrors = 34;               // ranks
constexpr Steps kFirstSteps = {{-50, 0, 50}};  // about 1.2 standard errors apart

std::int8_t cell_of(std::int32_t key, Grid grid) {
    return static_cast<std::int8_t>(std::clamp((key - grid.origin) >> grid.shift, kFirstCell, kLastCell));
}

void count_portable(const std::int8_t* cells, int blocks, Steps steps, Scan& scan) {
    std::fill_n(scan.below, kSteps, 0);
    for (int i = 0; i < blocks * kBlock; ++i)
        for (int step = 0; step < kSteps; ++step) scan.below[step] += cells[i] < steps.cells[step];
}

template <typename Format>
void measure_portable(const typename Format::Bits* x, int blocks, Grid grid, Steps steps, std::int8_t* cells,
                      Scan& scan) {
    for (int block = 0; block < blocks; ++block) {
        std::int32_t largest = 0;
        float squares = 0;
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i) {
            const std::int32_t key = key_of<Format>(x[i]);
            const float value = value_of(key, Format());
            largest = std::max(largest, key);
            squares += value * value;
            cells[i] = cell_of(key, grid);
        }
        scan.largest[block] = largest;
        scan.squares[block] = squares;
    }
    count_portable(cells, blocks, steps, scan);
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

    Top(const Bits* x, std::int64_t k, std::int64_t* index) : x_(x), k_(k), index_(index) {}

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
    std::int32_t threshold_ = -1;
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

    Image(const Bits* x, std::int64_t count, std::int8_t* cells, const Scanner<Format>& scanner)
        : x_(x), count_(count), cells_(cells), scanner_(scanner) {}

    void measure(std::int64_t k, float* values, std::int64_t* index, float& median, float& mean_square,
                 std::int64_t& nonfinite) const {
        constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
        Top<Format> top(x_, k, index);
        double squares = 0;
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
        const Grid grid = grid_over(sampled_range());
        std::int64_t below[kSteps] = {};
        fill_cells(grid, below, [&](std::int64_t start, std::int32_t largest, float block_squares) {
            if (largest >= Format::kBig) {
                take_values(start, start + kBlock);
                return;
            }
            squares += static_cast<double>(block_squares);
            if (largest > top.threshold()) offer_block(start, top);
        });
        take_values(count_ - count_ % kBlock, count_);

        const std::int64_t found = top.finish();
        for (std::int64_t rank = 0; rank < found; ++rank)
            values[rank] = value_of(key_of<Format>(x_[index[rank]]), Format());
        std::fill(values + found, values + k, kNaN);
        std::fill(index + found, index + k, -1);
        const std::int64_t finite = count_ - nonfinite;
        mean_square = static_cast<float>(squares / static_cast<double>(finite));
        median = finite > 0 ? find((finite - 1) / 2, grid, below) : kNaN;
    }

 private:
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

    // Writes all cells, counts those before kFirstSteps, and hands every block's statistics to `take`.
    template <typename Take>
    void fill_cells(Grid grid, std::int64_t* below, Take take) const {
        Scan scan;
        std::int64_t start = 0;
        for (; count_ - start >= kBlock;) {
            const int blocks = static_cast<int>(std::min<std::int64_t>((count_ - start) / kBlock, kBlocks));
            scanner_.measure(x_ + start, blocks, grid, kFirstSteps, cells_ + start, scan);
            for (int i = 0; i < kSteps; ++i) below[i] += scan.below[i];
            for (int block = 0; block < blocks; ++block)
                take(start + block * kBlock, scan.largest[block], scan.squares[block]);
            start += blocks * kBlock;
        }
        if (start == count_) return;
        // The rest is filled up with cells that come before no step.
        std::fill_n(cells_ + start, kBlock, static_cast<std::int8_t>(kLastCell));
        for (std::int64_t i = start; i < count_; ++i) cells_[i] = cell_of(key_of<Format>(x_[i]), grid);
        count_portable(cells_ + start, 1, kFirstSteps, scan);
        for (int i = 0; i < kSteps; ++i) below[i] += scan.below[i];
    }

    void count_cells(Steps steps, std::int64_t* below) const {
        Scan scan;
        const std::int64_t all = (count_ + kBlock - 1) / kBlock;
        for (std::int64_t block = 0; block < all; block += kBlocks) {
            const int blocks = static_cast<int>(std::min<std::int64_t>(all - block, kBlocks));
            scanner_.count(cells_ + block * kBlock, blocks, steps, scan);
            for (int i = 0; i < kSteps; ++i) below[i] += scan.below[i];
        }
    }

    // The keys among which the median probably is.
    KeyRange sampled_range() const {
        if (count_ < kSample) return {0, Format::kInfinity - 1};
        std::int32_t sample[kSample];
        for (int place = 0; place < kPlaces; ++place) {
            // Multiples of the golden ratio, modulo 1, fall everywhere and in step with no width.
            const std::uint64_t share = (place * std::uint64_t{0x9e3779b97f4a7c15}) >> 32;
            const Bits* at = x_ + ((share * static_cast<std::uint64_t>(count_ - kNeighbours)) >> 32);
            for (int i = 0; i < kNeighbours; ++i) sample[place * kNeighbours + i] = key_of<Format>(at[i]);
        }
        const std::int32_t last = of_rank(sample, kSample / 2 + kThreeErrors).last;
        return {of_rank(sample, kSample / 2 - kThreeErrors).first, std::min(last, Format::kInfinity - 1)};
    }

    // About the key of this rank in the sample, by bisection: a processor counts faster than it sorts.
    static KeyRange of_rank(const std::int32_t* sample, int rank) {
        constexpr std::int32_t kResolution = sizeof(Bits) == 2 ? 1 : 1 << 15;
        KeyRange range{0, Format::kMask};  // 2^n - 1, so halves stay multiples of the resolution
        while (range.last - range.first >= kResolution) {
            const std::int32_t middle = range.first + (range.last - range.first) / 2;
            int up_to = 0;
            for (int i = 0; i < kSample; ++i) up_to += sample[i] <= middle;
            if (up_to > rank) {
                range.last = middle;
            } else {
                range.first = middle + 1;
            }
        }
        return range;
    }

    // The range lies within the grid, its first and last cell left out.
    static Grid grid_over(KeyRange range) {
        int shift = 0;
        while ((range.last - range.first) >> shift > kLastCell - kFirstCell - 4) ++shift;
        return {range.first + (range.last - range.first) / 2, shift};
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
    float find(std::int64_t rank, Grid grid, const std::int64_t* counted) const {
        std::int64_t below[kSteps];
        std::copy_n(counted, kSteps, below);
        while (true) {
            Search search(rank, count_);
            search.learn(kFirstSteps, below);
            KeyRange keys = keys_of(search, grid);
            while (!close_enough<Format>(keys) && search.high() - search.low() > 1) {
                const Steps steps = search.next();
                std::fill_n(below, kSteps, 0);
                count_cells(steps, below);
                search.learn(steps, below);
                keys = keys_of(search, grid);
            }
            if (close_enough<Format>(keys)) return middle_of<Format>(keys);
            grid = grid_over(keys);
            std::fill_n(below, kSteps, 0);
            fill_cells(grid, below, [](std::int64_t, std::int32_t, float) {});
        }
    }

    const Bits* x_;
    std::int64_t count_;
    std::int8_t* cells_;
    const Scanner<Format>& scanner_;
};

template <typename Format>
void measure_images(const Activations& in, std::int64_t first, std::int64_t last, std::int64_t k,
                    const Magnitudes& out, std::int8_t* cells, Instructions instructions) {
    const Scanner<Format> chosen = scanner<Format>(instructions);
    const auto* x = static_cast<const typename Format::Bits*>(in.x);
    for (std::int64_t i = first; i < last; ++i)
        Image<Format>(x + i * in.image_stride, in.values_per_image, cells, chosen)
            .measure(k, out.values + i * k, out.index + i * k, out.median[i], out.mean_square[i],
                     out.nonfinite[i]);
}

// Splits the images between threads; the caller is one of them.
template <typename Format>
void measure(const Activations& in, std::int64_t k, const Magnitudes& out, std::int8_t* scratch, int threads,
             Instructions instructions) {
    const std::int64_t bytes =
        in.images * in.values_per_image * static_cast<std::int64_t>(sizeof(typename Format::Bits));
    const std::int64_t parts = std::max<std::int64_t>(
        1, std::min({in.images, bytes / kBytesPerThread, std::int64_t{threads}, std::int64_t{kMostThreads}}));
    const auto measure_part = [&](std::int64_t part, std::int64_t first, std::int64_t last) {
        measure_images<Format>(in, first, last, k, out, scratch + part * scratch_size(in.values_per_image, 1),
                               instructions);
    };
    std::thread helpers[kMostThreads];
    std::int64_t first = 0;
    for (std::int64_t part = 1; part < parts; ++part) {
        const std::int64_t last = in.images * part / parts;
        try {
            helpers[part] = std::thread(measure_part, part, first, last);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the caller does the rest
        }
        first = last;
    }
    measure_part(0, first, in.images);
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
    return (values_per_image + kBlock) * std::min(threads, kMostThreads);
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
