#include "paint.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

namespace activemark {
namespace {

constexpr std::int64_t kMaxSide = 1 << 24;  // pixels
constexpr std::int64_t kMaxOctaves = 32;
constexpr std::int64_t kMaxDiscs = std::numeric_limits<std::int32_t>::max();

struct Size {
    std::int64_t height, width;
    std::int64_t pixels() const { return height * width; }
};

bool within(std::int64_t value, std::int64_t low, std::int64_t high) { return low <= value && value <= high; }

bool valid(Size size, const Octave* octaves, std::int64_t octave_count) {
    if (!within(size.height, 1, kMaxSide) || !within(size.width, 1, kMaxSide)) return false;
    for (std::int64_t i = 0; i < octave_count; ++i) {
        const std::int64_t most = (std::int64_t{1} << i) - 1;
        if (!within(octaves[i].shift_y, 0, most) || !within(octaves[i].shift_x, 0, most)) return false;
    }
    return true;
}

// The integer part of a value in 0 ... 255; the nearer of the two for what lies beyond.
std::uint8_t to_byte(double value) {
    return static_cast<std::uint8_t>(static_cast<int>(std::min(std::max(0.0, value), 255.0)));
}

struct Colour {
    double red, green, blue;
};

// Lightness, yellow and red are the axes along which the colours of natural scenes vary.
Colour colour_of(double lightness, double yellow, double red) {
    return {lightness + yellow + red, lightness + yellow - red, lightness - 2 * yellow};
}

// A row of an image's three channels.
class Row {
 public:
    Row(std::uint8_t* image, Size size, std::int64_t y)
        : red_(image + y * size.width), green_(red_ + size.pixels()), blue_(green_ + size.pixels()) {}

    void put(std::int64_t x, const Colour& colour) {
        red_[x] = to_byte(colour.red);
        green_[x] = to_byte(colour.green);
        blue_[x] = to_byte(colour.blue);
    }

 private:
    std::uint8_t *red_, *green_, *blue_;
};

// One octave of a random field, seen from the image.
class Lattice {
 public:
    Lattice(Size size, const Octave& octave, std::int64_t log_step)
        : octave_(octave),
          log_step_(log_step),
          rows_(((size.height - 1 + octave.shift_y) >> log_step) + 2),
          columns_(((size.width - 1 + octave.shift_x) >> log_step) + 2),
          across_(size.width),
          between_(columns_) {
        for (std::int64_t x = 0; x < size.width; ++x) across_[x] = beyond_point(x + octave.shift_x);
    }

    // Adds the values of a row of pixels, interpolated bilinearly, times `amplitude`.
    void add_row(std::int64_t channel, std::int64_t y, double amplitude, double* __restrict sums) {
        const std::int64_t row = (y + octave_.shift_y) >> log_step_;
        const double* above = octave_.lattice + (channel * rows_ + row) * columns_;
        const double* below = above + columns_;
        const double down = beyond_point(y + octave_.shift_y);
        double* between = between_.data();
        for (std::int64_t j = 0; j < columns_; ++j) between[j] = above[j] * (1 - down) + below[j] * down;
        const auto width = static_cast<std::int64_t>(across_.size());
        const double* across = across_.data();
        for (std::int64_t j = 0, x = 0; x < width; ++j) {
            const double left = between[j], right = between[j + 1];
            const std::int64_t end = std::min(((j + 1) << log_step_) - octave_.shift_x, width);
            for (; x < end; ++x) sums[x] += (left * (1 - across[x]) + right * across[x]) * amplitude;
        }
    }

 private:
    // How far a place is from the lattice's last point before it, in steps.
    double beyond_point(std::int64_t place) const {
        const std::int64_t step = std::int64_t{1} << log_step_;
        return static_cast<double>(place & (step - 1)) / static_cast<double>(step);
    }

    Octave octave_;
    std::int64_t log_step_;
    std::int64_t rows_, columns_;
    std::vector<double> across_;   // how far each pixel of a row is from the lattice's last column before it
    std::vector<double> between_;  // the lattice at the height of a row of pixels
};

// Channels of a random field, each scaled to -1 ... 1.
class Field {
 public:
    Field(Size size, std::int64_t channels, const Octave* octaves, std::int64_t octave_count, double gain)
        : size_(size), sums_(channels * size.pixels()), low_(channels), range_(channels) {
        std::vector<Lattice> lattices;
        for (std::int64_t i = 0; i < octave_count; ++i) lattices.emplace_back(size, octaves[i], i);
        // Column by column, as the compiler does not vectorise the least of a row.
        std::vector<double> lowest(size.width), highest(size.width);
        for (std::int64_t channel = 0; channel < channels; ++channel) {
            std::fill(lowest.begin(), lowest.end(), std::numeric_limits<double>::infinity());
            std::fill(highest.begin(), highest.end(), -std::numeric_limits<double>::infinity());
            for (std::int64_t y = 0; y < size.height; ++y) {
                double* sums = sums_.data() + channel * size.pixels() + y * size.width;
                double amplitude = 1;
                for (Lattice& lattice : lattices) {
                    lattice.add_row(channel, y, amplitude, sums);
                    amplitude *= gain;
                }
                for (std::int64_t x = 0; x < size.width; ++x) {
                    lowest[x] = std::min(lowest[x], sums[x]);
                    highest[x] = std::max(highest[x], sums[x]);
                }
            }
            low_[channel] = *std::min_element(lowest.begin(), lowest.end());
            range_[channel] = *std::max_element(highest.begin(), highest.end()) - low_[channel];
        }
    }

    double at(std::int64_t channel, std::int64_t y, std::int64_t x) const {
        const double sum = sums_[channel * size_.pixels() + y * size_.width + x];
        return 2 * (sum - low_[channel]) / range_[channel] - 1;
    }

 private:
    Size size_;
    std::vector<double> sums_;
    std::vector<double> low_, range_;  // of each channel
};

// (height, width): which disc is seen at each pixel.
std::vector<std::int32_t> seen_discs(Size size, const Disc* discs, std::int64_t disc_count) {
    std::vector<std::int32_t> seen(size.pixels(), 0);
    const auto clip = [](double value, std::int64_t most) {  // and cut off the fraction
        return static_cast<std::int64_t>(std::min(std::max(0.0, value), static_cast<double>(most)));
    };
    for (std::int64_t index = 1; index < disc_count; ++index) {
        const Disc& disc = discs[index];
        const double radius_squared = disc.radius * disc.radius;
        const std::int64_t bottom = clip(disc.y + disc.radius + 1, size.height);
        for (std::int64_t y = clip(disc.y - disc.radius, size.height); y < bottom; ++y) {
            const double dy = static_cast<double>(y) - disc.y;
            const auto inside = [&](std::int64_t x) {
                const double dx = static_cast<double>(x) - disc.x;
                return dx * dx + dy * dy <= radius_squared;
            };
            // The root is rounded: the chord is taken a little too long, and cut to what is inside.
            const double half = std::sqrt(std::max(0.0, radius_squared - dy * dy));
            std::int64_t left = clip(disc.x - half, size.width);
            std::int64_t right = clip(disc.x + half + 2, size.width);
            while (left < right && !inside(left)) ++left;
            while (left < right && !inside(right - 1)) --right;
            std::int32_t* row = seen.data() + y * size.width;
            std::fill(row + left, row + right, static_cast<std::int32_t>(index));
        }
    }
    return seen;
}

void leaves(Size size, const Disc* discs, std::int64_t disc_count, const Octave* octaves,
            std::int64_t octave_count, std::uint8_t* image) {
    const std::vector<std::int32_t> seen = seen_discs(size, discs, disc_count);
    const bool textured = octave_count > 0;
    const Field texture(size, textured ? 1 : 0, octaves, octave_count, 1);
    for (std::int64_t y = 0; y < size.height; ++y) {
        const std::int32_t* row_seen = seen.data() + y * size.width;
        Row row(image, size, y);
        for (std::int64_t x = 0; x < size.width;) {
            const std::int32_t index = row_seen[x];
            const Disc& disc = discs[index];
            const Colour colour = colour_of(disc.lightness, disc.yellow, disc.red);
            const double light_y = (static_cast<double>(y) - disc.y) * disc.slope_y;
            for (; x < size.width && row_seen[x] == index; ++x) {
                double light = (static_cast<double>(x) - disc.x) * disc.slope_x + light_y;
                if (textured) light += texture.at(0, y, x) * disc.texture;
                row.put(x, {colour.red + light, colour.green + light, colour.blue + light});
            }
        }
    }
}

void clouds(Size size, const Octave* octaves, std::int64_t octave_count, double gain, const Axis& lightness,
            const Axis& yellow, const Axis& red, std::uint8_t* image) {
    const Field field(size, 3, octaves, octave_count, gain);
    for (std::int64_t y = 0; y < size.height; ++y) {
        Row row(image, size, y);
        for (std::int64_t x = 0; x < size.width; ++x) {
            row.put(x, colour_of(lightness.mean + lightness.spread * field.at(0, y, x),
                                 yellow.mean + yellow.spread * field.at(1, y, x),
                                 red.mean + red.spread * field.at(2, y, x)));
        }
    }
}

}  // namespace

PaintStatus paint_leaves(std::int64_t height, std::int64_t width, const Disc* discs, std::int64_t disc_count,
                         const Octave* octaves, std::int64_t octave_count, std::uint8_t* image) noexcept {
    const Size size{height, width};
    if (!within(disc_count, 1, kMaxDiscs) || !within(octave_count, 0, kMaxOctaves) ||
        !valid(size, octaves, octave_count))
        return PaintStatus::bad_size;
    try {
        leaves(size, discs, disc_count, octaves, octave_count, image);
    } catch (const std::bad_alloc&) {
        return PaintStatus::out_of_memory;
    }
    return PaintStatus::ok;
}

PaintStatus paint_clouds(std::int64_t height, std::int64_t width, const Octave* octaves,
                         std::int64_t octave_count, double gain, const Axis& lightness, const Axis& yellow,
                         const Axis& red, std::uint8_t* image) noexcept {
    const Size size{height, width};
    if (!within(octave_count, 1, kMaxOctaves) || !valid(size, octaves, octave_count))
        return PaintStatus::bad_size;
    try {
        clouds(size, octaves, octave_count, gain, lightness, yellow, red, image);
    } catch (const std::bad_alloc&) {
        return PaintStatus::out_of_memory;
    }
    return PaintStatus::ok;
}

}  // namespace activemark
