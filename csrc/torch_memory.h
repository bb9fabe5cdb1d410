// Tensors whose memory is used again when torch lets go of it; see memory.h.
#pragma once

#include <cstdint>
#include <limits>

#include "memory.h"
#include "torch_args.h"

// Since torch 2.11; null before, which is known only when the extension is loaded.
#if defined(__GNUC__) && !defined(_WIN32)
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr, int64_t storage_offset,
                int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout,
                const uint8_t* opaque_metadata, int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx),
                void* deleter_ctx);
#define SGSC_FROM_BLOB torch_from_blob
#else
#define SGSC_FROM_BLOB nullptr
#endif

namespace sgsc {

constexpr int64_t REUSED_FROM = int64_t{1} << 18;  // bytes; below, the C library itself keeps what is freed

// Whether torch fills memory that nobody has written, as it does for tests that look for what a kernel left out:
// torch.utils.deterministic.fill_uninitialized_memory. The stable ABI has no question for it but an empty tensor.
inline bool fills_uninitialised(const Tensor& like) {
  const Tensor probe = empty(like, {1}, ScalarType::Long);
  return *static_cast<const int64_t*>(probe.const_data_ptr()) == std::numeric_limits<int64_t>::max();
}

// As `empty`, of the dtype of `like` and without gaps. From REUSED_FROM on its storage cannot be resized.
inline Tensor empty_reused(const Tensor& like, const Sizes& sizes, int64_t element_size) {
  int64_t bytes = element_size;
  for (int64_t size : sizes) bytes *= size;
  const auto from_blob = SGSC_FROM_BLOB;
  if (!from_blob || bytes < REUSED_FROM) return empty(like, sizes);
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  Block* block = take_block(bytes);
  if (fills_uninitialised(like)) std::memset(block->data, 0xff, bytes);  // NaN in every floating dtype
  AtenTensorHandle made = nullptr;
  // If this fails, whether the deleter ran is not known: then rather lose the block than give it twice.
  STABLE_TORCH_ERROR_CODE_CHECK(from_blob(
      block->data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype,
      aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { give_block(static_cast<Block*>(context)); }, block));
  return Tensor(made);
}

}  // namespace sgsc
