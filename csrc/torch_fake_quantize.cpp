// The quantizer's operations as torch sees them.
#include "fake_quantize.h"
#include "torch_args.h"
#include "torch_memory.h"

namespace {

using sgsc::ANY;
using sgsc::empty;
using sgsc::empty_reused;
using sgsc::Sizes;
using sgsc::take;
using sgsc::threads;
using sgsc::Type;
using sgsc::type_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// What the operands of one call point into: copies must outlive the kernel.
struct Operands {
  const char* op;
  Tensors alive;

  explicit Operands(const char* name) : op(name) {}

  const void* keep(const char* name, const Tensor& t, ScalarType dtype, const Sizes& want) {
    alive.push_back(take(op, name, t, dtype, want));
    return alive.back().const_data_ptr();
  }

  // The operands of `count` grids.
  void keep_grids(sgsc::GridRows& t, int64_t count, const Tensor& scale, const Tensor& lo, const Tensor& hi,
                  const Tensor& shift) {
    const ScalarType dtype = real(t.type);
    t.scale = keep("scale", scale, dtype, {count});
    t.lo = keep("lo", lo, dtype, {count});
    t.hi = keep("hi", hi, dtype, {count});
    t.shift = keep("shift", shift, dtype, {count});
  }

  static ScalarType real(Type type) { return type == Type::f64 ? ScalarType::Double : ScalarType::Float; }
};

// The tensors of one call.
struct Batch : Operands {
  using Operands::Operands;
  std::vector<sgsc::GridRows> tensors;
  Tensors out, grad_scale, grad_lo, grad_hi;

  void* make(Tensors& results, const Tensor& like, const Sizes& sizes) {
    results.push_back(empty(like, sizes));
    return results.back().mutable_data_ptr();
  }

  void add(const Tensor* grad, const Tensor& x, const Tensor& scale, const Tensor& lo, const Tensor& hi,
           const Tensor& shift) {
    sgsc::GridRows t{};
    t.type = type_of(op, x, true);
    t.x = keep("x", x, x.scalar_type(), {ANY, ANY});
    t.rows = x.size(0), t.width = x.size(1);
    keep_grids(t, t.rows, scale, lo, hi, shift);
    if (grad) {
      t.grad = keep("grad", *grad, x.scalar_type(), {t.rows, t.width});
      t.grad_scale = make(grad_scale, scale, {t.rows});
      t.grad_lo = make(grad_lo, scale, {t.rows});
      t.grad_hi = make(grad_hi, scale, {t.rows});
    }
    out.push_back(empty_reused(x, {t.rows, t.width}, sgsc::size_of(t.type)));
    t.out = out.back().mutable_data_ptr();
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
  Batch batch("fake_quantize");
  batch.add(nullptr, x, scale, lo, hi, shift);
  sgsc::fake_quantize(batch.tensors, threads());
  return batch.out[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                                  const Tensor& scale, const Tensor& lo,
                                                                  const Tensor& hi, const Tensor& shift) {
  Batch batch("fake_quantize_backward");
  batch.add(&grad, x, scale, lo, hi, shift);
  sgsc::fake_quantize_backward(batch.tensors, threads());
  return {batch.out[0], batch.grad_scale[0], batch.grad_lo[0], batch.grad_hi[0]};
}

Tensors fake_quantize_many(const Tensors& x, const Tensors& scale, const Tensors& lo, const Tensors& hi,
                           const Tensors& shift) {
  Batch batch("fake_quantize_many");
  batch.add(nullptr, x, scale, lo, hi, shift);
  sgsc::fake_quantize(batch.tensors, threads());
  return batch.out;
}

Tensors fake_quantize_many_backward(const Tensors& grad, const Tensors& x, const Tensors& scale, const Tensors& lo,
                                    const Tensors& hi, const Tensors& shift) {
  Batch batch("fake_quantize_many_backward");
  batch.add(&grad, x, scale, lo, hi, shift);
  sgsc::fake_quantize_backward(batch.tensors, threads());
  Tensors all = batch.out;
  for (const Tensors* kind : {&batch.grad_scale, &batch.grad_lo, &batch.grad_hi})
    all.insert(all.end(), kind->begin(), kind->end());
  return all;
}

// A row and what it is mixed of.
struct Mixture : Operands {
  sgsc::MixedRow mixed{};
  Tensor out;

  Mixture(const char* name, const Tensor& x, const Tensor& share, const Tensor& scale, const Tensor& lo,
          const Tensor& hi, const Tensor& shift)
      : Operands(name), out(empty_reused(x, {x.numel()}, sgsc::size_of(type_of(name, x, true)))) {
    sgsc::GridRows& t = mixed.row;
    t.type = type_of(op, x, true);
    t.rows = 1, t.width = x.numel();
    mixed.grids = share.numel();
    t.x = keep("x", x, x.scalar_type(), {t.width});
    mixed.share = keep("share", share, real(t.type), {mixed.grids});
    keep_grids(t, mixed.grids, scale, lo, hi, shift);
    t.out = out.mutable_data_ptr();
  }
};

Tensor fake_quantize_mixed(const Tensor& x, const Tensor& share, const Tensor& scale, const Tensor& lo,
                           const Tensor& hi, const Tensor& shift) {
  Mixture of("fake_quantize_mixed", x, share, scale, lo, hi, shift);
  sgsc::fake_quantize_mixed(of.mixed, threads());
  return of.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fake_quantize_mixed_backward(const Tensor& grad, const Tensor& x,
                                                                                const Tensor& share,
                                                                                const Tensor& scale, const Tensor& lo,
                                                                                const Tensor& hi, const Tensor& shift) {
  Mixture of("fake_quantize_mixed_backward", x, share, scale, lo, hi, shift);
  sgsc::GridRows& t = of.mixed.row;
  t.grad = of.keep("grad", grad, x.scalar_type(), {t.width});
  const auto make = [&] { return empty(scale, {of.mixed.grids}); };
  Tensor grad_share = make(), grad_scale = make(), grad_lo = make(), grad_hi = make();
  of.mixed.grad_share = grad_share.mutable_data_ptr();
  t.grad_scale = grad_scale.mutable_data_ptr();
  t.grad_lo = grad_lo.mutable_data_ptr();
  t.grad_hi = grad_hi.mutable_data_ptr();
  sgsc::fake_quantize_mixed_backward(of.mixed, threads());
  return {of.out, grad_share, grad_scale, grad_lo, grad_hi};
}

// The floor of both directions, for benches: `to` = `from`, or from + with, past the caches.
void stream(const Tensor& from, const std::optional<Tensor>& with, const Tensor& to) {
  const auto dtype = ScalarType::Float;
  const Sizes like = sgsc::sizes_of(from);
  const Tensor a = take("_stream", "from", from, dtype, like),
               b = take("_stream", "with", with.value_or(from), dtype, like);
  if (!to.is_contiguous()) throw std::invalid_argument("_stream: to has gaps; want it contiguous");
  take("_stream", "to", to, dtype, like);
  if (reinterpret_cast<std::uintptr_t>(to.mutable_data_ptr()) % 64)
    throw std::invalid_argument("_stream: to does not begin on a cache line");
  sgsc::stream(static_cast<const float*>(a.const_data_ptr()),
               with ? static_cast<const float*>(b.const_data_ptr()) : nullptr,
               static_cast<float*>(to.mutable_data_ptr()), to.numel(), threads());
}

std::vector<int64_t> held_memory() {
  const sgsc::Held held = sgsc::held_memory();
  return {held.used, held.free};
}

void release_memory() { sgsc::release_blocks(); }

// For tests: memory of a result before it is written, and from how many bytes on results go past the caches.
Tensor uninitialised(const Tensor& like) {
  return empty_reused(like, sgsc::sizes_of(like), sgsc::size_of(type_of("_uninitialised", like, true)));
}

int64_t set_stream_from(int64_t bytes) { return sgsc::set_stream_from(bytes); }

}  // namespace

// Without a tensor argument the dispatcher finds no CPU key: these serve every key.
STABLE_TORCH_LIBRARY_IMPL(sgsc, CompositeExplicitAutograd, m) {
  m.impl("_held_memory", TORCH_BOX(&held_memory));
  m.impl("_release_memory", TORCH_BOX(&release_memory));
  m.impl("_set_stream_from", TORCH_BOX(&set_stream_from));
}

STABLE_TORCH_LIBRARY_IMPL(sgsc, CPU, m) {
  m.impl("_stream", TORCH_BOX(&stream));
  m.impl("_uninitialised", TORCH_BOX(&uninitialised));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("fake_quantize_many", TORCH_BOX(&fake_quantize_many));
  m.impl("fake_quantize_many_backward", TORCH_BOX(&fake_quantize_many_backward));
  m.impl("fake_quantize_mixed", TORCH_BOX(&fake_quantize_mixed));
  m.impl("fake_quantize_mixed_backward", TORCH_BOX(&fake_quantize_mixed_backward));
}
