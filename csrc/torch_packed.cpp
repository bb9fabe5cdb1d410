// The packed operations as torch sees them.
#include "packed_conv2d.h"
#include "packed_linear.h"
#include "packed_rows.h"
#include "torch_args.h"

namespace {

using sgsc::ANY;
using sgsc::empty;
using sgsc::PackedRows;
using sgsc::Sizes;
using sgsc::sizes_of;
using sgsc::take;
using sgsc::threads;
using sgsc::Type;
using sgsc::type_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sgsc, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_conv2d", TORCH_BOX(&packed_conv2d));
  m.impl("packed_embedding", TORCH_BOX(&packed_embedding));
}
