#include <torch/csrc/autograd/autograd.h>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/host_copies.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

using Make = std::function<at::Tensor(const at::Tensor&)>;
// Of a source and, where it is defined, an update of it; the residual may be undefined.
using MakeWithResidual = std::function<WithResidual(const at::Tensor&, const at::Tensor&)>;
using BlockFunction = std::function<at::Tensor(const at::Tensor&, bool)>;
using Hold = std::function<std::shared_ptr<void>()>;
std::shared_ptr<void> held(const Hold& hold) { return hold ? hold() : nullptr; }

// Carries what runs again from forward to backward through the context; its input too, where that waits in host memory.
struct BlockHolder : torch::CustomClassHolder {
  BlockHolder(BlockFunction run, Hold weights) : block(std::move(run)), hold(std::move(weights)) {}
  BlockFunction block;
  Hold hold;
  std::shared_ptr<HostCopies> host;
  size_t place = 0;
  bool trains_input = false;
};
struct MakeHolder : torch::CustomClassHolder {
  MakeHolder(MakeWithResidual run, bool trains, bool updated)
      : make(std::move(run)), trains_source(trains), has_update(updated) {}
  MakeWithResidual make;
  bool trains_source, has_update;
};

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  static at::Tensor forward(AutogradContext* ctx, const BlockFunction& block, const Hold& hold,
                            const std::shared_ptr<HostCopies>& host, const at::Tensor& x, at::TensorList parameters) {
    const auto holder = c10::make_intrusive<BlockHolder>(block, hold);
    holder->trains_input = x.requires_grad();
    variable_list saved = {host ? at::Tensor() : x};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    if (host) {
      holder->host = host;
      holder->place = host->put(x);
    }
    ctx->saved_data["block"] = c10::IValue::make_capsule(holder);
    const std::shared_ptr<void> weights = held(hold);
    return block(x, /*needs_value=*/true);  // gradients are off in here: nothing inside is kept
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list leaves = ctx->get_saved_variables();
    const auto holder = c10::static_intrusive_pointer_cast<BlockHolder>(ctx->saved_data["block"].toCapsule());
    const std::shared_ptr<void> weights = held(holder->hold);
    const at::AutoGradMode record(true);
    const at::Tensor x = holder->host ? holder->host->take(holder->place) : leaves[0].detach();
    leaves[0] = x.requires_grad_(holder->trains_input);
    variable_list inputs;
    for (const at::Tensor& leaf : leaves)
      if (leaf.requires_grad()) inputs.push_back(leaf);
    const variable_list gradients =
        torch::autograd::grad({holder->block(x, /*needs_value=*/false)}, inputs, grads, /*retain_graph=*/false,
                              /*create_graph=*/false, /*allow_unused=*/true);
    variable_list result = {at::Tensor(), at::Tensor(), at::Tensor()};  // the block itself, its hold, the copies
    size_t next = 0;
    for (const at::Tensor& leaf : leaves)
      result.push_back(leaf.requires_grad() ? gradients[next++] : at::Tensor());
    return result;
  }
};

struct AffineOfFunction : torch::autograd::Function<AffineOfFunction> {
  // `norm`: the leaf that make() uses, where it uses one.
  static variable_list forward(AutogradContext* ctx, const MakeWithResidual& make, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, bool needs_value, bool in_float8,
                               const at::Tensor& source, const std::optional<at::Tensor>& update,
                               const std::optional<at::Tensor>& norm) {
    const bool trains_source = source.requires_grad() || (update && update->requires_grad());
    const WithResidual made = needs_value ? make(source, update.value_or(at::Tensor())) : WithResidual{};
    ctx->save_for_backward({weight, made.residual.defined() ? made.residual : source, norm.value_or(at::Tensor())});
    ctx->set_materialize_grads(false);
    ctx->saved_data["make"] = c10::IValue::make_capsule(c10::make_intrusive<MakeHolder>(make, trains_source, update.has_value()));
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["in_float8"] = in_float8;
    const at::Tensor y = needs_value ? affine(made.value, weight, bias.value_or(at::Tensor()), /*needs_value=*/true, in_float8)
                                     : at::empty({source.size(0), weight.size(0)}, source.options().requires_grad(false));
    return made.residual.defined() ? variable_list{y, made.residual} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto holder = c10::static_intrusive_pointer_cast<MakeHolder>(ctx->saved_data["make"].toCapsule());
    CALDERA_ASSERT(grads[0].defined());
    const at::Tensor &weight = saved[0], &norm = saved[2], dy = grads[0].contiguous();
    const bool in_float8 = ctx->saved_data["in_float8"].toBool();
    const at::Tensor source = saved[1].detach().requires_grad_(holder->trains_source);
    WithResidual made;
    {
      const at::AutoGradMode record(true);
      made = holder->make(source, {});
    }
    const at::Tensor dweight = matrix_product(dy.t(), made.value.detach(), in_float8);
    const at::Tensor dbias = ctx->saved_data["has_bias"].toBool() ? dy.sum(0) : at::Tensor();
    variable_list leaves;
    for (const at::Tensor& leaf : {source, norm})
      if (leaf.defined() && leaf.requires_grad()) leaves.push_back(leaf);
    variable_list gradients;
    if (!leaves.empty()) {
      variable_list outputs = {made.value}, upstream = {matrix_product(dy, weight, in_float8)};
      if (holder->trains_source && grads.size() > 1 && grads[1].defined()) {
        outputs.push_back(made.residual);
        upstream.push_back(grads[1]);
      }
      gradients = torch::autograd::grad(outputs, leaves, upstream, /*retain_graph=*/false,
                                        /*create_graph=*/false, /*allow_unused=*/true);
    }
    const at::Tensor dsource = holder->trains_source ? gradients.front() : at::Tensor(),
                     dnorm = norm.defined() && norm.requires_grad() ? gradients.back() : at::Tensor(), none;
    return {none, dweight, dbias, none, none, dsource, holder->has_update ? dsource : none, dnorm};
  }
};

variable_list apply(const MakeWithResidual& make, const at::Tensor& source, const at::Tensor& update, const at::Tensor& norm,
                    const at::Tensor& weight, const at::Tensor& bias, bool needs_value, bool in_float8) {
  return AffineOfFunction::apply(make, weight, given(bias), needs_value, in_float8, source, given(update), given(norm));
}

}  // namespace

at::Tensor affine_of(const Make& make, const at::Tensor& source, const at::Tensor& weight, const at::Tensor& bias,
                     bool needs_value, bool in_float8) {
  // Where the weight stays as it is, its input is not kept anyway.
  if (!wants_grad(weight)) return affine(make(source), weight, bias, needs_value, in_float8);
  const MakeWithResidual alone = [make](const at::Tensor& x, const at::Tensor&) { return WithResidual{make(x), {}}; };
  return apply(alone, source, /*update=*/{}, /*norm=*/{}, weight, bias, needs_value, in_float8)[0];
}

WithResidual affine_of_norm(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& norm, double eps,
                            const at::Tensor& weight, const at::Tensor& bias, bool in_float8) {
  const MakeWithResidual make = [norm, eps](const at::Tensor& x, const at::Tensor& u) { return add_rms_norm(x, u, norm, eps); };
  if (!wants_grad(weight)) {
    const auto [normed, sum] = make(residual, update);
    return {affine(normed, weight, bias, /*needs_value=*/true, in_float8), sum};
  }
  const variable_list made = apply(make, residual, update, norm, weight, bias, /*needs_value=*/true, in_float8);
  return {made[0], made[1]};
}

at::Tensor recompute(BlockFunction block, const at::Tensor& x, const std::vector<at::Tensor>& parameters, Hold hold,
                     std::shared_ptr<HostCopies> host) {
  bool differentiable = wants_grad(x);
  for (const at::Tensor& parameter : parameters) differentiable = differentiable || wants_grad(parameter);
  if (!differentiable) {
    const std::shared_ptr<void> weights = held(hold);
    return block(x, /*needs_value=*/true);
  }
  return RecomputeFunction::apply(block, hold, host, x, at::TensorList(parameters));
}

}  // namespace caldera
