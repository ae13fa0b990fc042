// The inner loops of the CPU kernel, one version for each set of instructions. The files that are compiled
// for newer processors hold nothing but these loops: a standard function compiled there could be the copy
// that the linker keeps for everybody.
#pragma once

#include <cstdint>

#include "magnitude_keys.hpp"

namespace activemark {

constexpr int kBlock = 256;  // values whose largest key is told apart
constexpr int kBlocks = 16;  // most blocks of one call
constexpr int kSteps = 3;

// What memory is asked for ahead of time. While an image's cells are counted: the beginning of the next one,
// kAhead bytes for every 64 cells. While its values are read: what follows on that, so much more slowly than
// they are read that the image's end is reached with its last value.
constexpr int kAhead = 24;
template <typename Bits>
constexpr int kAheadPerValues = 64 * static_cast<int>(sizeof(Bits)) - kAhead;  // bytes for every 64 values

struct Steps {
    std::int8_t cells[kSteps];
};

// What is near the median, in cells of 2^shift keys: a key's cell is (key - origin) >> shift, and what does
// not fit into a byte goes to the first or the last cell. Bytes can be counted again at little cost.
struct Grid {
    std::int32_t origin;
    int shift;
    Steps steps;  // the first to be counted
};
constexpr int kFirstCell = -128;
constexpr int kLastCell = 127;

struct Scan {
    std::int32_t below[kSteps];     // how many values are in cells before each step
    std::int32_t largest[kBlocks];  // of each block: its largest key
    double squares;                 // their sum; of no use where a key is kBig or more
};

// Both work on `blocks` (1 ... kBlocks) blocks of kBlock values each.
template <typename Format>
struct Scanner {
    // Reads x and writes its cells, in any order. Asks for what lies at `ahead`.
    void (*measure)(const typename Format::Bits* x, int blocks, Grid grid, std::int8_t* cells, Scan& scan,
                    const char* ahead);
    // Reads cells; fills in `below` only. Asks for what lies at `ahead`.
    void (*count)(const std::int8_t* cells, int blocks, Steps steps, Scan& scan, const char* ahead);
};

// One for Float32, Float16 and BFloat16, where the processor is an x86.
template <typename Format>
Scanner<Format> scanner_avx2();
template <typename Format>
Scanner<Format> scanner_avx512();

}  // namespace activemark
