// The flat interface to the painter of synthetic images: raw pointers and sizes, no Python, no torch.
//
// Images are 3 * height * width values, red, green and blue, of which only the integer part is kept. They are
// the same to the bit on every machine: only integers, comparison and double +, -, *, /, sqrt are used, in a
// fixed order.
#pragma once

#include <cstdint>

namespace activemark {

enum class PaintStatus {
    ok,
    bad_size,      // a side or a count is below 1 or too large, or a shift is not in 0 ... step - 1
    out_of_memory  // there is none for an image in double
};

// An octave of a random field: channels of a lattice whose points are `step` pixels apart, 1 in the finest
// octave, 2 in the next, and so on. Pixel (y, x) lies at (y + shift_y) / step, (x + shift_x) / step on it;
// there are (height - 1 + shift_y) / step + 2 rows, and as many columns for the width.
struct Octave {
    const double* lattice;
    std::int64_t shift_y;
    std::int64_t shift_x;
};

// An opaque leaf of one colour, lit aslant. Python hands over arrays of them: doubles, in this order.
struct Disc {
    double x, y, radius;            // pixels
    double lightness, yellow, red;  // of its middle
    double slope_x, slope_y;        // lightness per pixel
    double texture;                 // the texture's amplitude
};

// What a random field in -1 ... 1 becomes: mean + spread * value.
struct Axis {
    double mean, spread;
};

// Discs, of which a later one hides an earlier one; the first lies everywhere. Where there are octaves, they
// are one channel of texture, each of the same amplitude.
PaintStatus paint_leaves(std::int64_t height, std::int64_t width, const Disc* discs, std::int64_t disc_count,
                         const Octave* octaves, std::int64_t octave_count, std::uint8_t* image) noexcept;

// Three channels of a random field: lightness, yellow, red. From one octave to the next coarser the amplitude
// grows by `gain`.
PaintStatus paint_clouds(std::int64_t height, std::int64_t width, const Octave* octaves,
                         std::int64_t octave_count, double gain, const Axis& lightness, const Axis& yellow,
                         const Axis& red, std::uint8_t* image) noexcept;

}  // namespace activemark
