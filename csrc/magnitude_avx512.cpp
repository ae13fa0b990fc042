// Compiled with -mavx512f -mavx512bw -mpopcnt; called only where the processor has them.
#include <immintrin.h>

#include "magnitude_scan.hpp"

namespace activemark {
namespace {

// What one register holds: 16 values of 32 bits, or 32 of 16 bits; their cells, as bytes, fill 16 or 32.
struct Wide {
    static constexpr int kLanes = 16;
    static __m512i all(std::int32_t value) { return _mm512_set1_epi32(value); }
    static __m512i larger(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }
    static std::int32_t largest(__m512i lanes) { return _mm512_reduce_max_epi32(lanes); }
    static void store_cells(std::int8_t* cells, __m512i key, __m512i origin, __m128i shift) {
        const __m512i wide = _mm512_sra_epi32(_mm512_sub_epi32(key, origin), shift);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(cells), _mm512_cvtsepi32_epi8(wide));
    }
};

struct Narrow {
    static constexpr int kLanes = 32;
    static __m512i all(std::int32_t value) { return _mm512_set1_epi16(static_cast<short>(value)); }
    static __m512i larger(__m512i a, __m512i b) { return _mm512_max_epi16(a, b); }
    static std::int32_t largest(__m512i lanes) {
        const __m512i even = _mm512_and_si512(lanes, _mm512_set1_epi32(0xffff));
        return _mm512_reduce_max_epi32(_mm512_max_epi32(even, _mm512_srli_epi32(lanes, 16)));
    }
    static void store_cells(std::int8_t* cells, __m512i key, __m512i origin, __m128i shift) {
        const __m512i wide = _mm512_sra_epi16(_mm512_sub_epi16(key, origin), shift);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells), _mm512_cvtsepi16_epi8(wide));
    }
};

// The values of one register, squared and added to two sums.
struct Squares {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();

    void add(__m512i bits, Float32) {
        const __m512 value = _mm512_castsi512_ps(bits);
        const __m512 longer = _mm512_fmadd_ps(value, value, first);
        first = second;  // by turns: one sum would make each addition wait for the last
        second = longer;
    }
    void add(__m512i bits, Float16) {
        add(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)));
    }
    void add(__m512i bits, BFloat16) {
        add(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(~0xffff))));
    }
    void add(__m512 a, __m512 b) {
        first = _mm512_fmadd_ps(a, a, first);
        second = _mm512_fmadd_ps(b, b, second);
    }
};

void count(const std::int8_t* cells, int blocks, Steps steps, Scan& scan, const char* ahead) {
    for (int i = 0; i < kSteps; ++i) scan.below[i] = 0;
    for (int at = 0; at < blocks * kBlock; at += 64, ahead += kAhead) {
        _mm_prefetch(ahead, _MM_HINT_T0);
        const __m512i some = _mm512_loadu_si512(cells + at);
        for (int i = 0; i < kSteps; ++i)
            scan.below[i] += static_cast<std::int32_t>(
                _mm_popcnt_u64(_mm512_cmplt_epi8_mask(some, _mm512_set1_epi8(steps.cells[i]))));
    }
}

template <typename Format, typename Lanes>
void measure(const typename Format::Bits* x, int blocks, Grid grid, std::int8_t* cells, Scan& scan,
             const char* ahead) {
    constexpr int kAheadPerRegister = kAheadPerValues<typename Format::Bits> * Lanes::kLanes / 64;
    const __m512i mask = Lanes::all(Format::kMask), origin = Lanes::all(grid.origin);
    const __m128i shift = _mm_cvtsi32_si128(grid.shift);
    std::int8_t* next = cells;
    Squares squares;
    for (int block = 0; block < blocks; ++block) {
        __m512i largest = _mm512_setzero_si512();
        for (int i = 0; i < kBlock; i += Lanes::kLanes, x += Lanes::kLanes, next += Lanes::kLanes) {
            _mm_prefetch(ahead, _MM_HINT_T0);
            ahead += kAheadPerRegister;
            const __m512i bits = _mm512_loadu_si512(x);
            const __m512i key = _mm512_and_si512(bits, mask);
            largest = Lanes::larger(largest, key);
            squares.add(bits, Format());
            Lanes::store_cells(next, key, origin, shift);
        }
        scan.largest[block] = Lanes::largest(largest);
    }
    scan.squares = _mm512_reduce_add_ps(_mm512_add_ps(squares.first, squares.second));
    // They are in the first cache still, and what it asks for is there as well.
    count(cells, blocks, grid.steps, scan, reinterpret_cast<const char*>(cells));
}

}  // namespace

template <>
Scanner<Float32> scanner_avx512<Float32>() {
    return {measure<Float32, Wide>, count};
}

template <>
Scanner<Float16> scanner_avx512<Float16>() {
    return {measure<Float16, Narrow>, count};
}

template <>
Scanner<BFloat16> scanner_avx512<BFloat16>() {
    return {measure<BFloat16, Narrow>, count};
}

}  // namespace activemark
