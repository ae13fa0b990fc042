// The flat interface to the magnitude kernels: raw pointers and sizes, no Python, no torch.
#pragma once

#include <cstdint>

namespace activemark {

enum class Status {
    ok,
    bad_size,       // a count is negative, or k is not in 1 ... values_per_image
    out_of_memory,  // the k candidates of one image do not fit in memory
};

// For every image, the k largest |x| in descending order, their flat positions within the image, and how
// many of its values are NaN or infinite. Those are never among the k; of equal magnitudes the lower
// position comes first. Where an image has fewer than k finite values, the rest of its row is NaN in
// `values` and -1 in `index`.
//
//   x          image i is the contiguous run x[i * image_stride] ... x[i * image_stride + values_per_image -
//   1] values     images * k index      images * k nonfinite  images
//
// On any status but ok, nothing in the outputs may be used.
Status top_magnitudes_f32(const float* x, std::int64_t images, std::int64_t values_per_image,
                          std::int64_t image_stride, std::int64_t k, float* values, std::int64_t* index,
                          std::int64_t* nonfinite) noexcept;

}  // namespace activemark
