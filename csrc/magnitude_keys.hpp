// Magnitudes as integers, for all back ends.
#pragma once

#include <cstdint>
#include <cstring>

#include "magnitude.hpp"

#ifdef __CUDACC__
#define ACTIVEMARK_ANYWHERE __host__ __device__
#else
#define ACTIVEMARK_ANYWHERE
#endif

namespace activemark {

// A key is a value's bits without the sign: integers that order as the magnitudes do. NaN and infinities have
// the largest keys, from kInfinity on. From kBig on, squares could overflow a float.
struct Float32 {
    using Bits = std::uint32_t;
    static constexpr std::int32_t kMask = 0x7fffffff;
    static constexpr std::int32_t kInfinity = 0x7f800000;
    static constexpr std::int32_t kBig = 0x5d800000;  // 2^60
};

struct Float16 {
    using Bits = std::uint16_t;
    static constexpr std::int32_t kMask = 0x7fff;
    static constexpr std::int32_t kInfinity = 0x7c00;
    static constexpr std::int32_t kBig = kInfinity;
};

struct BFloat16 {
    using Bits = std::uint16_t;
    static constexpr std::int32_t kMask = 0x7fff;
    static constexpr std::int32_t kInfinity = 0x7f80;
    static constexpr std::int32_t kBig = 0x5d80;  // 2^60
};

template <typename Format>
ACTIVEMARK_ANYWHERE std::int32_t key_of(typename Format::Bits bits) {
    return static_cast<std::int32_t>(bits) & Format::kMask;
}

ACTIVEMARK_ANYWHERE inline float as_float(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ACTIVEMARK_ANYWHERE inline float value_of(std::int32_t key, Float32) { return as_float(key); }
ACTIVEMARK_ANYWHERE inline float value_of(std::int32_t key, BFloat16) { return as_float(key << 16); }
ACTIVEMARK_ANYWHERE inline float value_of(std::int32_t key, Float16) {
    constexpr std::int32_t kSmallestNormal = 0x400, kBias = 127 - 15;
    if (key < kSmallestNormal) return static_cast<float>(key) / (1 << 24);
    return as_float((key << 13) + (kBias << 23));
}

struct KeyRange {
    std::int32_t first;
    std::int32_t last;
};

template <typename Format>
ACTIVEMARK_ANYWHERE float middle_of(KeyRange keys) {
    return value_of(keys.first + (keys.last - keys.first) / 2, Format());
}

// Whether the middle stands for all of these keys.
template <typename Format>
ACTIVEMARK_ANYWHERE bool close_enough(KeyRange keys) {
    const double first = value_of(keys.first, Format()), last = value_of(keys.last, Format());
    const double middle = middle_of<Format>(keys);
    return middle - first <= kMedianError * first && last - middle <= kMedianError * first;
}

}  // namespace activemark
