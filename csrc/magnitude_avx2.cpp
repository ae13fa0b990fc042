// Compiled with -mavx2 -mfma -mf16c; called only where the processor has them.
#include <immintrin.h>

#include "magnitude_scan.hpp"

namespace activemark {
namespace {

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

float sum(__m256 lanes) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

std::int32_t sum(__m256i lanes) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(half);
}

std::int32_t largest_of(__m256i lanes) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(half);
}

// What one register holds: 8 values of 32 bits, or 16 of 16 bits.
struct Wide {
    static constexpr int kLanes = 8;
    static __m256i all(std::int32_t value) { return _mm256_set1_epi32(value); }
    static __m256i larger(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }
    static std::int32_t largest(__m256i lanes) { return largest_of(lanes); }
    template <bool kShifted>
    static __m256i cells(__m256i key, __m256i origin, __m128i shift) {
        const __m256i distance = _mm256_sub_epi32(key, origin);
        return kShifted ? _mm256_srav_epi32(distance, _mm256_broadcastd_epi32(shift)) : distance;
    }
    static __m256i pack(const __m256i (&cells)[4]) {
        return _mm256_packs_epi16(_mm256_packs_epi32(cells[0], cells[1]),
                                  _mm256_packs_epi32(cells[2], cells[3]));
    }
};

struct Narrow {
    static constexpr int kLanes = 16;
    static __m256i all(std::int32_t value) { return _mm256_set1_epi16(static_cast<short>(value)); }
    static __m256i larger(__m256i a, __m256i b) { return _mm256_max_epi16(a, b); }
    static std::int32_t largest(__m256i lanes) {
        const __m256i even = _mm256_and_si256(lanes, _mm256_set1_epi32(0xffff));
        return largest_of(_mm256_max_epi32(even, _mm256_srli_epi32(lanes, 16)));
    }
    template <bool kShifted>
    static __m256i cells(__m256i key, __m256i origin, __m128i shift) {
        const __m256i distance = _mm256_sub_epi16(key, origin);
        return kShifted ? _mm256_sra_epi16(distance, shift) : distance;
    }
    static __m256i pack(const __m256i (&cells)[2]) { return _mm256_packs_epi16(cells[0], cells[1]); }
};

// The squares of 32 values, added to four sums: one sum would make each addition wait for the last.
struct Squares {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};

    void add(__m256i key, int part, Float32) { add(_mm256_castsi256_ps(key), part); }
    void add(__m256i key, int part, Float16) {
        add(_mm256_cvtph_ps(_mm256_castsi256_si128(key)), 2 * part);
        add(_mm256_cvtph_ps(_mm256_extracti128_si256(key, 1)), 2 * part + 1);
    }
    void add(__m256i key, int part, BFloat16) {
        add(_mm256_castsi256_ps(_mm256_slli_epi32(key, 16)), 2 * part);
        add(_mm256_castsi256_ps(_mm256_and_si256(key, _mm256_set1_epi32(~0xffff))), 2 * part + 1);
    }
    void add(__m256 value, int at) { sums[at] = _mm256_fmadd_ps(value, value, sums[at]); }
    float total() const {
        return sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    }
};

// How many cells come before each step. A byte counts to 255; a block has 8 registers of cells.
class Below {
 public:
    explicit Below(Steps steps) {
        for (int i = 0; i < kSteps; ++i) steps_[i] = _mm256_set1_epi8(steps.cells[i]);
    }
    void add(__m256i cells) {
        for (int i = 0; i < kSteps; ++i)
            counts_[i] = _mm256_sub_epi8(counts_[i], _mm256_cmpgt_epi8(steps_[i], cells));
    }
    void store(std::int32_t* below) const {
        for (int i = 0; i < kSteps; ++i) below[i] = sum(_mm256_sad_epu8(counts_[i], _mm256_setzero_si256()));
    }

 private:
    static_assert(kBlocks * kBlock / 32 <= 255, "a byte cannot count so far");
    __m256i steps_[kSteps];
    __m256i counts_[kSteps] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
};

template <typename Format, typename Lanes, bool kShifted>
void scan_blocks(const typename Format::Bits* x, int blocks, Grid grid, std::int8_t* cells, Scan& scan,
                 const char* ahead) {
    constexpr int kAheadPerRegister = kAheadPerValues<typename Format::Bits> * Lanes::kLanes / 64;
    constexpr int kRegisters = 32 / Lanes::kLanes;
    const __m256i mask = Lanes::all(Format::kMask), origin = Lanes::all(grid.origin);
    const __m128i shift = _mm_cvtsi32_si128(grid.shift);
    Below below(grid.steps);
    Squares squares;
    for (int block = 0; block < blocks; ++block) {
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < kBlock; i += 32, cells += 32) {
            __m256i wide[kRegisters];
            for (int part = 0; part < kRegisters; ++part, x += Lanes::kLanes) {
                if (part % 2 == 0) _mm_prefetch(ahead + part * kAheadPerRegister, _MM_HINT_T0);
                const __m256i key = _mm256_and_si256(load(x), mask);
                largest = Lanes::larger(largest, key);
                squares.add(key, part, Format());
                wide[part] = Lanes::template cells<kShifted>(key, origin, shift);
            }
            ahead += kRegisters * kAheadPerRegister;
            const __m256i packed = Lanes::pack(wide);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells), packed);
            below.add(packed);
        }
        scan.largest[block] = Lanes::largest(largest);
    }
    scan.squares = squares.total();
    below.store(scan.below);
}

// A grid of bfloat16 has single keys for cells, as a rule.
template <typename Format, typename Lanes>
void measure(const typename Format::Bits* x, int blocks, Grid grid, std::int8_t* cells, Scan& scan,
             const char* ahead) {
    if (grid.shift == 0) {
        scan_blocks<Format, Lanes, false>(x, blocks, grid, cells, scan, ahead);
    } else {
        scan_blocks<Format, Lanes, true>(x, blocks, grid, cells, scan, ahead);
    }
}

void count(const std::int8_t* cells, int blocks, Steps steps, Scan& scan, const char* ahead) {
    Below below(steps);
    for (int i = 0; i < blocks * kBlock; i += 128, ahead += 2 * kAhead) {
        _mm_prefetch(ahead, _MM_HINT_T0);
        for (int part = 0; part < 128; part += 32) below.add(load(cells + i + part));
    }
    below.store(scan.below);
}

}  // namespace

template <>
Scanner<Float32> scanner_avx2<Float32>() {
    return {measure<Float32, Wide>, count};
}

template <>
Scanner<Float16> scanner_avx2<Float16>() {
    return {measure<Float16, Narrow>, count};
}

template <>
Scanner<BFloat16> scanner_avx2<BFloat16>() {
    return {measure<BFloat16, Narrow>, count};
}

}  // namespace activemark
