// The only file that sees torch: checks arguments, allocates results and registers the CPU kernels.
//
// LibTorch's stable ABI, so that one binary serves every torch from 2.10 on. Schemas, fakes and references are in
// kernels/*.py. All checks are done before the threads start: an exception thrown inside loses its text.
// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError.
#include <Python.h>
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

#include "fake_quantize.h"
#include "isa.h"
#include "packed_conv2d.h"
#include "packed_linear.h"
#include "packed_rows.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name up to torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using sgsc::PackedRows;
using sgsc::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr int64_t ANY = -1;  // of a size

sgsc::Threads threads() {
  return {torch::stable::get_num_threads(), [](int64_t tasks, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

std::string text(const Sizes& sizes) {
  std::string all;
  for (int64_t size : sizes)
    all += (all.empty() ? "" : ", ") + (size == ANY ? std::string("any") : std::to_string(size));
  return "(" + all + ")";
}

// Checks device, dtype and shape; returns the tensor, or a copy of it without gaps where it has any.
Tensor take(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Sizes& want) {
  const Sizes got = sizes_of(t);
  bool fits = got.size() == want.size();
  for (size_t i = 0; fits && i < got.size(); ++i) fits = want[i] == ANY || want[i] == got[i];
  if (!t.is_cpu() || t.scalar_type() != dtype || !fits) {
    std::ostringstream what;
    what << op << ": " << name << " is " << text(got) << " " << t.scalar_type() << (t.is_cpu() ? "" : " elsewhere")
         << "; want " << text(want) << " " << dtype << " on the CPU";
    throw std::invalid_argument(what.str());
  }
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Type type_of(const char* op, const Tensor& x, bool with_double) {
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
Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
  int32_t code = dtype ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype)) : 0;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          dtype ? &code : nullptr, nullptr, nullptr, 0, nullptr,
                                                          &made));
  return Tensor(made);
}

// ---- fake_quantize ----

// Tensors of one call and what they point into: copies must outlive the kernel.
struct Batch {
  const char* op;
  std::vector<sgsc::GridRows> tensors;
  Tensors alive, out, grad_scale, grad_lo, grad_hi;

  const void* keep(const char* name, const Tensor& t, ScalarType dtype, const Sizes& want) {
    alive.push_back(take(op, name, t, dtype, want));
    return alive.back().const_data_ptr();
  }

  void* make(Tensors& results, const Tensor& like, const Sizes& sizes) {
    results.push_back(empty(like, sizes));
    return results.back().mutable_data_ptr();
  }

  void add(const Tensor* grad, const Tensor& x, const Tensor& scale, const Tensor& lo, const Tensor& hi,
           const Tensor& shift) {
    const Type type = type_of(op, x, true);
    const ScalarType real = type == Type::f64 ? ScalarType::Double : ScalarType::Float;
    sgsc::GridRows t{};
    t.type = type;
    t.x = keep("x", x, x.scalar_type(), {ANY, ANY});
    t.rows = x.size(0), t.width = x.size(1);
    t.scale = keep("scale", scale, real, {t.rows});
    t.lo = keep("lo", lo, real, {t.rows});
    t.hi = keep("hi", hi, real, {t.rows});
    t.shift = keep("shift", shift, real, {t.rows});
    if (grad) {
      t.grad = keep("grad", *grad, x.scalar_type(), {t.rows, t.width});
      t.grad_scale = make(grad_scale, scale, {t.rows});
      t.grad_lo = make(grad_lo, scale, {t.rows});
      t.grad_hi = make(grad_hi, scale, {t.rows});
    }
    t.out = make(out, x, {t.rows, t.width});
    tensors.push_back(t);
  }

  void add(const Tensors* grad, const Tensors& x, const Tensors& scale, const Tensors& lo, const Tensors& hi,
           const Tensors& shift) {
    for (const auto* list : {grad ? grad : &x, &scale, &lo, &hi, &shift})
      if (list->size() != x.size())
        throw std::invalid_argument(std::string(op) + ": lists of " + std::to_string(x.size()) + " and " +
                                    std::to_string(list->size()) + " tensors; want one grid a tensor");
    for (size_t i = 0; i < x.size(); ++i) add(grad ? &(*grad)[i] : nullptr, x[i], scale[i], lo[i], hi[i], shift[i]);
  }
};

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const Tensor& lo, const Tensor& hi, const Tensor& shift) {
  Batch batch{"fake_quantize"};
  batch.add(nullptr, x, scale, lo, hi, shift);
  sgsc::fake_quantize(batch.tensors, threads());
  return batch.out[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                                  const Tensor& scale, const Tensor& lo,
                                                                  const Tensor& hi, const Tensor& shift) {
  Batch batch{"fake_quantize_backward"};
  batch.add(&grad, x, scale, lo, hi, shift);
  sgsc::fake_quantize_backward(batch.tensors, threads());
  return {batch.out[0], batch.grad_scale[0], batch.grad_lo[0], batch.grad_hi[0]};
}

Tensors fake_quantize_many(const Tensors& x, const Tensors& scale, const Tensors& lo, const Tensors& hi,
                           const Tensors& shift) {
  Batch batch{"fake_quantize_many"};
  batch.add(nullptr, x, scale, lo, hi, shift);
  sgsc::fake_quantize(batch.tensors, threads());
  return batch.out;
}

Tensors fake_quantize_many_backward(const Tensors& grad, const Tensors& x, const Tensors& scale, const Tensors& lo,
                                    const Tensors& hi, const Tensors& shift) {
  Batch batch{"fake_quantize_many_backward"};
  batch.add(&grad, x, scale, lo, hi, shift);
  sgsc::fake_quantize_backward(batch.tensors, threads());
  Tensors all = batch.out;
  for (const Tensors* kind : {&batch.grad_scale, &batch.grad_lo, &batch.grad_hi})
    all.insert(all.end(), kind->begin(), kind->end());
  return all;
}

// ---- packed rows ----

// A checked view, and the tensors that it points into.
struct Packed {
  Tensor data, bits, starts;
  PackedRows rows;

  Packed(const char* op, const std::optional<Tensor>& bytes, const Tensor& widths, const Tensor& first, int64_t width,
         int64_t length = 0)
      : data(bytes ? take(op, "data", *bytes, ScalarType::Byte, {ANY}) : widths),
        bits(take(op, "bits", widths, ScalarType::Byte, {ANY})),
        starts(take(op, "starts", first, ScalarType::Long, {bits.size(0) + 1})),
        rows{bytes ? data.const_data_ptr<uint8_t>() : nullptr,
             bytes ? data.numel() : length,
             bits.const_data_ptr<uint8_t>(),
             starts.const_data_ptr<int64_t>(),
             bits.numel(),
             width} {
    sgsc::check(op, rows);
  }
};

Tensor pack(const Tensor& levels, const Tensor& bits, const Tensor& starts, int64_t length) {
  const Tensor in = take("pack", "levels", levels, ScalarType::Byte, {ANY, ANY});
  const Packed shape("pack", std::nullopt, bits, starts, in.size(1), length);
  take("pack", "levels", in, ScalarType::Byte, {bits.numel(), ANY});
  Tensor data = empty(in, {length});
  sgsc::pack(in.const_data_ptr<uint8_t>(), shape.rows, data.mutable_data_ptr<uint8_t>(), threads());
  return data;
}

Tensor unpack(const Tensor& data, const Tensor& bits, const Tensor& starts, int64_t width) {
  const Packed packed("unpack", data, bits, starts, width);
  Tensor levels = empty(data, {packed.rows.rows, width});
  sgsc::unpack(packed.rows, levels.mutable_data_ptr<uint8_t>(), threads());
  return levels;
}

Tensor packed_embedding(const Tensor& index, const Tensor& data, const Tensor& bits, const Tensor& starts,
                        const Tensor& scale, const Tensor& offset, int64_t width) {
  const Packed packed("packed_embedding", data, bits, starts, width);
  const int64_t rows = packed.rows.rows;
  const Tensor which = take("packed_embedding", "index", index, ScalarType::Long, {ANY});
  const Tensor s = take("packed_embedding", "scale", scale, ScalarType::Float, {rows});
  const Tensor o = take("packed_embedding", "offset", offset, ScalarType::Float, {rows});
  Tensor y = empty(s, {which.numel(), width});
  sgsc::packed_embedding(which.const_data_ptr<int64_t>(), which.numel(), packed.rows, s.const_data_ptr<float>(),
                         o.const_data_ptr<float>(), y.mutable_data_ptr<float>(), threads());
  return y;
}

// The operands of a product as floats, and its result, which has the dtype of x.
struct Product {
  Type type;
  Tensor x, scale, offset, y, sums;  // y as floats: y itself where it is float32
  std::optional<Tensor> bias;

  Product(const char* op, const Tensor& input, const Sizes& want, const Tensor& s, const Tensor& o,
          const std::optional<Tensor>& b, int64_t rows, const Sizes& result)
      : type(type_of(op, input, false)),
        x(wide(take(op, "x", input, input.scalar_type(), want))),
        scale(take(op, "scale", s, ScalarType::Float, {rows})),
        offset(take(op, "offset", o, ScalarType::Float, {rows})),
        y(empty(input, result)),
        sums(type == Type::f32 ? y : empty(input, result, ScalarType::Float)) {
    if (b) bias = wide(take(op, "bias", *b, input.scalar_type(), {rows}));
  }

  Tensor wide(const Tensor& t) const {
    if (type == Type::f32) return t;
    Tensor floats = empty(t, sizes_of(t), ScalarType::Float);
    sgsc::widen(type, t.const_data_ptr(), t.numel(), floats.mutable_data_ptr<float>(), threads());
    return floats;
  }

  static const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
  const float* bias_data() const { return bias ? floats(*bias) : nullptr; }
  float* out() const { return sums.mutable_data_ptr<float>(); }

  Tensor result() const {
    if (type != Type::f32) sgsc::narrow(floats(sums), sums.numel(), type, y.mutable_data_ptr(), threads());
    return y;
  }
};

Tensor packed_linear(const Tensor& x, const Tensor& data, const Tensor& bits, const Tensor& starts, const Tensor& scale,
                     const Tensor& offset, const std::optional<Tensor>& bias, int64_t width) {
  const Packed packed("packed_linear", data, bits, starts, width);
  const int64_t rows = packed.rows.rows, m = x.dim() ? x.size(0) : 0;
  const Product p("packed_linear", x, {ANY, width}, scale, offset, bias, rows, {m, rows});
  sgsc::packed_linear(p.floats(p.x), m, packed.rows, p.floats(p.scale), p.floats(p.offset), p.bias_data(), p.out(),
                      threads());
  return p.result();
}

Tensor packed_conv2d(const Tensor& x, const Tensor& data, const Tensor& bits, const Tensor& starts, const Tensor& scale,
                     const Tensor& offset, const std::optional<Tensor>& bias, const Sizes& kernel, const Sizes& stride,
                     const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Sizes shape = sizes_of(x);
  const int64_t rows = bits.numel();
  const sgsc::Convolution c(shape, rows, kernel, stride, padding, dilation, groups);
  const Packed packed("packed_conv2d", data, bits, starts, c.levels);
  const Product p("packed_conv2d", x, shape, scale, offset, bias, rows, {c.batch, rows, c.out_height, c.out_width});
  sgsc::packed_conv2d(p.floats(p.x), c, packed.rows, p.floats(p.scale), p.floats(p.offset), p.bias_data(), p.out(),
                      threads());
  return p.result();
}

std::string isa() { return sgsc::isa_name(); }

std::string set_isa(std::string name) {
  sgsc::set_isa(name);
  return name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sgsc, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("fake_quantize_many", TORCH_BOX(&fake_quantize_many));
  m.impl("fake_quantize_many_backward", TORCH_BOX(&fake_quantize_many_backward));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_conv2d", TORCH_BOX(&packed_conv2d));
  m.impl("packed_embedding", TORCH_BOX(&packed_embedding));
}

// Without a tensor argument the dispatcher finds no CPU key: these serve every key.
STABLE_TORCH_LIBRARY_IMPL(sgsc, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
}

// PyMODINIT_FUNC keeps the symbol visible under -fvisibility=hidden.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
