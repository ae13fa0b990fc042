// The flat interface to the magnitude kernels: raw pointers and sizes, no Python, no torch.
#pragma once

#include <cstdint>

namespace activemark {

enum class Status {
    ok,
    bad_size,      // a count or a stride is negative, k is not in 1 ... values_per_image, threads < 1, or on
                   // CUDA k > kMaxTopCuda
    unsupported,   // this processor lacks the instructions asked for
    launch_failed  // CUDA refused the launch
};

enum class Dtype : int { float32, float16, bfloat16 };

// What a processor can run, each a superset of the one before.
enum class Instructions : int { portable, avx2, avx512 };

// One image's values are a contiguous run; image i starts image_stride values after image i - 1.
struct Activations {
    const void* x;
    Dtype dtype;
    std::int64_t images;
    std::int64_t values_per_image;
    std::int64_t image_stride;
};

// Of every image: the k largest |x| in descending order and their positions in the image (of equal magnitudes
// the lower position comes first), the median of |x| (the lower of two middle ones), the mean of x * x, and
// how many values are NaN or infinite. Those take part in nothing else. Where an image has fewer than k
// finite values, the rest of its row is NaN in `values` and -1 in `index`; without any, median and mean
// square are NaN too. The median is exact in bfloat16 and within kMedianError of it, relatively, in the other
// dtypes.
struct Magnitudes {
    float* values;            // images * k
    std::int64_t* index;      // images * k
    float* median;            // images
    float* mean_square;       // images
    std::int64_t* nonfinite;  // images
};

constexpr double kMedianError = 0.0025;

// The best instructions of this processor.
Instructions best_instructions() noexcept;

// How many bytes of scratch memory `magnitudes_cpu` wants.
std::int64_t scratch_size(std::int64_t values_per_image, int threads) noexcept;

// Reads every image once from memory (again where a guess at its median was bad), on up to `threads` threads,
// and allocates nothing but those. On any status but ok, nothing in the outputs may be used.
Status magnitudes_cpu(const Activations& activations, std::int64_t k, const Magnitudes& out,
                      std::int8_t* scratch, int threads, Instructions instructions) noexcept;

// The most values that the CUDA kernel keeps of an image.
constexpr std::int64_t kMaxTopCuda = 32;

// How many bytes of device memory `magnitudes_cuda` wants on the current device; -1 if CUDA cannot be asked.
std::int64_t scratch_size_cuda(std::int64_t images, std::int64_t values_per_image) noexcept;

// The same on the current device: all pointers are device memory, the work is queued on `stream` (a
// cudaStream_t) and not waited for. Only in packages that were built with CUDA.
Status magnitudes_cuda(const Activations& activations, std::int64_t k, const Magnitudes& out, void* scratch,
                       void* stream) noexcept;

}  // namespace activemark
