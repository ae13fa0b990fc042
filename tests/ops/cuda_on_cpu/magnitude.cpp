// The CUDA kernel, compiled for the CPU and callable from Python's ctypes.
#include "../../../csrc/magnitude_cuda.cu"

using namespace activemark;

extern "C" int magnitudes(int processors, const void* x, int dtype, std::int64_t images,
                          std::int64_t values_per_image, std::int64_t image_stride, std::int64_t k,
                          float* values, std::int64_t* index, float* median, float* mean_square,
                          std::int64_t* nonfinite) {
    processors_of_the_device = processors;
    std::vector<std::uint64_t> scratch(
        static_cast<std::size_t>(scratch_size_cuda(images, values_per_image)) / 8 + 1, ~std::uint64_t{0});
    return static_cast<int>(
        magnitudes_cuda({x, static_cast<Dtype>(dtype), images, values_per_image, image_stride}, k,
                        {values, index, median, mean_square, nonfinite}, scratch.data(), nullptr));
}
