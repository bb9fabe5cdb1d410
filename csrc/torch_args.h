// What every binding needs: argument checks, results, and torch's threads behind ours.
//
// LibTorch's stable ABI, so that one binary serves every torch from 2.10 on. Schemas, fakes and references are in
// kernels/*.py. All checks are done before the threads start: an exception thrown inside loses its text.
// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "number.h"
#include "threads.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name up to torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace sgsc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t ANY = -1;  // of a size

inline Threads threads() {
  return {torch::stable::get_num_threads(), [](int64_t tasks, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

inline Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

inline std::string text(const Sizes& sizes) {
  std::string all;
  for (int64_t size : sizes)
    all += (all.empty() ? "" : ", ") + (size == ANY ? std::string("any") : std::to_string(size));
  return "(" + all + ")";
}

// Checks device, dtype and shape; returns the tensor, or a copy of it without gaps where it has any. Allocates nothing
// where all is well: small layers take as long as this does.
inline Tensor take(const char* op, const char* name, const Tensor& t, ScalarType dtype, const int64_t* want,
                   size_t dimensions) {
  const auto got = t.sizes();
  bool fits = got.size() == dimensions;
  for (size_t i = 0; fits && i < dimensions; ++i) fits = want[i] == ANY || want[i] == got[i];
  if (!t.is_cpu() || t.scalar_type() != dtype || !fits) {
    std::ostringstream what;
    what << op << ": " << name << " is " << text(sizes_of(t)) << " " << t.scalar_type()
         << (t.is_cpu() ? "" : " elsewhere") << "; want " << text(Sizes(want, want + dimensions)) << " " << dtype
         << " on the CPU";
    throw std::invalid_argument(what.str());
  }
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor take(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                   std::initializer_list<int64_t> want) {
  return take(op, name, t, dtype, want.begin(), want.size());
}

inline Tensor take(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Sizes& want) {
  return take(op, name, t, dtype, want.data(), want.size());
}

inline Type type_of(const char* op, const Tensor& x, bool with_double) {
  const ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Float) return Type::f32;
  if (dtype == ScalarType::BFloat16) return Type::bf16;
  if (dtype == ScalarType::Half) return Type::f16;
  if (dtype == ScalarType::Double && with_double) return Type::f64;
  std::ostringstream what;
  what << op << ": x is " << dtype << "; want Float, BFloat16" << (with_double ? ", Half or Double" : " or Half");
  throw std::invalid_argument(what.str());
}

// Not torch::stable::empty_like and its kin: they look the operator up by name at each call.
inline Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
  int32_t code = dtype ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype)) : 0;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          dtype ? &code : nullptr, nullptr, nullptr, 0, nullptr,
                                                          &made));
  return Tensor(made);
}

}  // namespace sgsc
