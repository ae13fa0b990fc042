#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

#include "magnitude.hpp"

namespace activemark {
namespace {

// Without its sign bit, an IEEE float orders as the integer of the same bits; NaN and infinity come last.
// Integers, because a compiler may not vectorise a maximum of floats that might be NaN.
constexpr std::int32_t kMagnitudeMask = 0x7fffffff;
constexpr std::int32_t kInfinityBits = 0x7f800000;
constexpr std::int64_t kBlock = 256;

std::int32_t magnitude_bits(const float* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits & kMagnitudeMask;
}

std::int32_t largest_bits(const float* x, std::int64_t count) {
    std::int32_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t bits = magnitude_bits(x + i);
        largest = largest > bits ? largest : bits;
    }
    return largest;
}

struct Candidate {
    std::int32_t bits;
    std::int64_t index;
};

bool ranks_before(const Candidate& a, const Candidate& b) {
    return a.bits != b.bits ? a.bits > b.bits : a.index < b.index;
}

// Keeps the best k candidates as a heap whose front is the one that would be dropped next.
void keep(std::vector<Candidate>& best, std::size_t k, Candidate candidate) {
    if (best.size() == k) {
        std::pop_heap(best.begin(), best.end(), ranks_before);
        best.back() = candidate;
    } else {
        best.push_back(candidate);
    }
    std::push_heap(best.begin(), best.end(), ranks_before);
}

// Fills `best` with the k largest of one image, unordered, and returns the count of non-finite values.
std::int64_t scan_image(const float* x, std::int64_t count, std::size_t k, std::vector<Candidate>& best) {
    best.clear();
    std::int64_t nonfinite = 0;
    // Values arrive by rising index, so only a strictly larger one can displace a candidate.
    std::int32_t threshold = -1;
    for (std::int64_t start = 0; start < count; start += kBlock) {
        const std::int64_t end = std::min(start + kBlock, count);
        if (largest_bits(x + start, end - start) <= threshold) continue;
        for (std::int64_t i = start; i < end; ++i) {
            const std::int32_t bits = magnitude_bits(x + i);
            if (bits <= threshold) continue;
            if (bits >= kInfinityBits) {
                ++nonfinite;
                continue;
            }
            keep(best, k, {bits, i});
            if (best.size() == k) threshold = best.front().bits;
        }
    }
    return nonfinite;
}

}  // namespace

Status top_magnitudes_f32(const float* x, std::int64_t images, std::int64_t values_per_image,
                          std::int64_t image_stride, std::int64_t k, float* values, std::int64_t* index,
                          std::int64_t* nonfinite) noexcept {
    if (images < 0 || image_stride < 0 || k < 1 || k > values_per_image) return Status::bad_size;

    std::vector<Candidate> best;
    try {
        best.reserve(static_cast<std::size_t>(k));
    } catch (const std::exception&) {
        return Status::out_of_memory;
    }
    for (std::int64_t image = 0; image < images; ++image) {
        nonfinite[image] =
            scan_image(x + image * image_stride, values_per_image, static_cast<std::size_t>(k), best);
        std::sort_heap(best.begin(), best.end(), ranks_before);
        float* image_values = values + image * k;
        std::int64_t* image_index = index + image * k;
        const std::int64_t found = static_cast<std::int64_t>(best.size());
        for (std::int64_t rank = 0; rank < found; ++rank) {
            std::memcpy(&image_values[rank], &best[rank].bits, sizeof(float));
            image_index[rank] = best[rank].index;
        }
        std::fill(image_values + found, image_values + k, std::numeric_limits<float>::quiet_NaN());
        std::fill(image_index + found, image_index + k, -1);
    }
    return Status::ok;
}

}  // namespace activemark
