// The packed operations as torch sees them.
#include "fake_quantize.h"
#include "packed_conv2d.h"
#include "packed_linear.h"
#include "packed_rows.h"
#include "tiles.h"
#include "torch_memory.h"

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

// A checked view of the run form, and the tensors that it points into.
struct Tiled {
  Tensor lines, plan, grid;
  sgsc::Tiles tiles;

  Tiled(const char* op, const Tensor& l, const Tensor& p, const Tensor& g, int64_t rows, const sgsc::LevelOrder& order)
      : lines(take(op, "lines", l, ScalarType::Byte, {ANY})),
        plan(take_plan(op, p)),
        grid(take(op, "grid", g, ScalarType::Float, {2, count(plan) * sgsc::TILE})),
        tiles(view(lines.const_data_ptr<uint8_t>(), lines.numel(), plan, rows, order)) {
    tiles.scale = grid.const_data_ptr<float>();
    tiles.offset = tiles.scale + tiles.count * sgsc::TILE;
    sgsc::check(op, tiles);
  }

  static int64_t count(const Tensor& plan) { return plan.numel() / (1 + sgsc::TILE); }

  static Tensor take_plan(const char* op, const Tensor& plan) {
    const Tensor taken = take(op, "plan", plan, ScalarType::Int, {ANY});
    if (taken.numel() % (1 + sgsc::TILE))
      throw std::invalid_argument(std::string(op) + ": plan has " + std::to_string(taken.numel()) +
                                  " numbers; want a width and 16 rows a tile, a multiple of 17");
    return taken;
  }

  // Without the grid.
  static sgsc::Tiles view(const uint8_t* lines, int64_t length, const Tensor& plan, int64_t rows,
                          const sgsc::LevelOrder& order) {
    const int32_t* widths = plan.const_data_ptr<int32_t>();
    const int64_t tiles = count(plan);
    return {lines, length, widths, widths + tiles, nullptr, nullptr, tiles, rows, order.blocks()};
  }
};

Tensor tile(const Tensor& data, const Tensor& bits, const Tensor& starts, const Tensor& plan, int64_t width,
            int64_t area, int64_t length) {
  const Packed packed("tile", data, bits, starts, width);
  if (area < 1 || width % area || length < 0)
    throw std::invalid_argument("tile: an area of " + std::to_string(area) + " for rows of " + std::to_string(width) +
                                " levels, and a length of " + std::to_string(length) +
                                "; want a divisor, and 0 or more");
  const Tensor taken = Tiled::take_plan("tile", plan);
  const sgsc::LevelOrder order(width, area);
  const sgsc::Tiles shape = Tiled::view(nullptr, length, taken, packed.rows.rows, order);
  sgsc::check("tile", shape);
  sgsc::check_widths("tile", packed.rows, shape);
  Tensor lines = sgsc::empty_reused(data, {length}, 1);  // on huge pages: a product reads it a third faster
  sgsc::tile(packed.rows, order, shape, lines.mutable_data_ptr<uint8_t>(), threads());
  return lines;
}

// What both products are given beside the tiles: x, bias and the grid of x as they are, and y made.
struct Operands {
  Type type;
  Tensor x, y;
  std::optional<Tensor> bias, values;
  std::optional<sgsc::InputGrid> grid;

  // `integers`: whether codes are multiplied; else a grid is no longer there, and x is on it.
  Operands(const char* op, const Tensor& input, const Sizes& want, const std::optional<Tensor>& b, int64_t rows,
           const Sizes& result, const std::optional<Tensor>& input_grid, bool integers)
      : type(type_of(op, input, false)), x(take(op, "x", input, input.scalar_type(), want)), y(empty(input, result)) {
    if (b) bias = take(op, "bias", *b, input.scalar_type(), {rows});
    if (!input_grid) return;
    values = take(op, "input_grid", *input_grid, ScalarType::Float, {3 + rows});
    grid.emplace(op, values->const_data_ptr<float>());
    if (!integers) round();
  }
  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }
  const sgsc::InputGrid* grid_data() const { return grid ? &*grid : nullptr; }

 private:
  void round() {
    const float shift = 0;
    sgsc::GridRows row{};
    row.type = type, row.rows = 1, row.width = x.numel(), row.x = x.const_data_ptr();
    row.scale = &grid->scale, row.lo = &grid->code_min, row.hi = &grid->code_max, row.shift = &shift;
    const Tensor rounded = sgsc::empty_reused(x, sizes_of(x), sgsc::size_of(type));
    row.out = rounded.mutable_data_ptr();
    sgsc::fake_quantize({row}, threads());
    x = rounded;
    grid.reset();
  }
};

void check_size(const char* op, const char* name, int64_t size) {
  if (size < 0 || size > int64_t{1} << 40)
    throw std::invalid_argument(std::string(op) + ": " + name + " is " + std::to_string(size) + "; want 0 to 2^40");
}

Tensor packed_linear(const Tensor& x, const Tensor& lines, const Tensor& plan, const Tensor& grid,
                     const std::optional<Tensor>& bias, int64_t rows, int64_t width, bool int8,
                     const std::optional<Tensor>& input_grid) {
  check_size("packed_linear", "rows", rows);
  check_size("packed_linear", "width", width);
  const Tiled tiled("packed_linear", lines, plan, grid, rows, sgsc::LevelOrder(width, 1));
  Sizes want = sizes_of(x), result = want;  // any rank of at least one
  (want.empty() ? want.emplace_back() : want.back()) = width;
  (result.empty() ? result.emplace_back() : result.back()) = rows;
  const bool integers = int8 && sgsc::as_integers(width, input_grid.has_value());
  const Operands p("packed_linear", x, want, bias, rows, result, input_grid, integers);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < want.size(); ++i) m *= want[i];
  const sgsc::Linear layer{p.type, p.x.const_data_ptr(), p.bias_data(), p.y.mutable_data_ptr(), m, width,
                           rows,   p.grid_data()};
  sgsc::packed_linear(layer, tiled.tiles, integers, threads());
  return p.y;
}

Tensor packed_conv2d(const Tensor& x, const Tensor& lines, const Tensor& plan, const Tensor& grid,
                     const std::optional<Tensor>& bias, int64_t rows, const Sizes& kernel, const Sizes& stride,
                     const Sizes& padding, const Sizes& dilation, int64_t groups, bool int8,
                     const std::optional<Tensor>& input_grid) {
  check_size("packed_conv2d", "rows", rows);
  const Sizes shape = sizes_of(x);
  const sgsc::Convolution c(shape, rows, kernel, stride, padding, dilation, groups);
  const Tiled tiled("packed_conv2d", lines, plan, grid, rows, c.order());
  sgsc::check_groups(c, tiled.tiles);
  const bool integers = int8 && c.in_integers(input_grid.has_value());
  const Operands p("packed_conv2d", x, {c.batch, c.inputs, c.height, c.width}, bias, rows,
                   {c.batch, rows, c.out_height, c.out_width}, input_grid, integers);
  sgsc::packed_conv2d({p.type, p.x.const_data_ptr(), p.bias_data(), p.y.mutable_data_ptr(), p.grid_data()}, c,
                      tiled.tiles, integers, threads());
  return p.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sgsc, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("tile", TORCH_BOX(&tile));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_conv2d", TORCH_BOX(&packed_conv2d));
  m.impl("packed_embedding", TORCH_BOX(&packed_embedding));
}
