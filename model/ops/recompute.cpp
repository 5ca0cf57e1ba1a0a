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
using Block = std::function<at::Tensor(const at::Tensor&, bool)>;
using Hold = std::function<std::shared_ptr<void>()>;
std::shared_ptr<void> held(const Hold& hold) { return hold ? hold() : nullptr; }

// Carries what runs again from forward to backward through the context; its input too, where that waits in host memory.
struct BlockHolder : torch::CustomClassHolder {
  BlockHolder(Block run, Hold weights) : block(std::move(run)), hold(std::move(weights)) {}
  Block block;
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
  static at::Tensor forward(AutogradContext* ctx, const Block& block, const Hold& hold,
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

std::optional<at::Tensor> given(const at::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; }

struct AffineOfFunction : torch::autograd::Function<AffineOfFunction> {
  static variable_list forward(AutogradContext* ctx, const MakeWithResidual& make, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, bool needs_value, bool in_float8,
                               const at::Tensor& source, const std::optional<at::Tensor>& update,
                               at::TensorList parameters) {
    const bool trains_source = source.requires_grad() || (update && update->requires_grad());
    const WithResidual made = needs_value ? make(source, update.value_or(at::Tensor())) : WithResidual{};
    variable_list saved = {weight, made.residual.defined() ? made.residual : source};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
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
    const at::Tensor &weight = saved[0], dy = grads[0].contiguous();
    const bool in_float8 = ctx->saved_data["in_float8"].toBool();
    variable_list leaves(saved.begin() + 1, saved.end()), inputs;
    leaves[0] = leaves[0].detach().requires_grad_(holder->trains_source);
    for (const at::Tensor& leaf : leaves)
      if (leaf.requires_grad()) inputs.push_back(leaf);
    WithResidual made;
    {
      const at::AutoGradMode record(true);
      made = holder->make(leaves[0], {});
    }
    variable_list result = {at::Tensor(), matrix_product(dy.t(), made.value.detach(), in_float8),
                            ctx->saved_data["has_bias"].toBool() ? dy.sum(0) : at::Tensor(),
                            at::Tensor(), at::Tensor()};
    variable_list gradients;
    if (!inputs.empty()) {
      variable_list outputs = {made.value}, upstream = {matrix_product(dy, weight, in_float8)};
      if (holder->trains_source && grads.size() > 1 && grads[1].defined()) {
        outputs.push_back(made.residual);
        upstream.push_back(grads[1]);
      }
      gradients = torch::autograd::grad(outputs, inputs, upstream, /*retain_graph=*/false,
                                        /*create_graph=*/false, /*allow_unused=*/true);
    }
    size_t next = 0;
    for (const at::Tensor& leaf : leaves)
      result.push_back(leaf.requires_grad() ? gradients[next++] : at::Tensor());
    const at::Tensor d_source = result[5];
    result.insert(result.begin() + 6, holder->has_update ? d_source : at::Tensor());
    return result;
  }
};

variable_list apply(const MakeWithResidual& make, const at::Tensor& source, const at::Tensor& update, at::TensorList parameters,
                    const at::Tensor& weight, const at::Tensor& bias, bool needs_value, bool in_float8) {
  return AffineOfFunction::apply(make, weight, given(bias), needs_value, in_float8, source, given(update), parameters);
}

}  // namespace

at::Tensor affine_of(const Make& make, const at::Tensor& source, const std::vector<at::Tensor>& parameters,
                     const at::Tensor& weight, const at::Tensor& bias, bool needs_value, bool in_float8) {
  // Where the weight stays as it is, its input is not kept anyway.
  if (!wants_grad(weight)) return affine(make(source), weight, bias, needs_value, in_float8);
  const MakeWithResidual alone = [make](const at::Tensor& x, const at::Tensor&) { return WithResidual{make(x), {}}; };
  return apply(alone, source, /*update=*/{}, parameters, weight, bias, needs_value, in_float8)[0];
}

WithResidual affine_of_norm(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& norm, double eps,
                            const at::Tensor& weight, const at::Tensor& bias, bool in_float8) {
  const MakeWithResidual make = [norm, eps](const at::Tensor& x, const at::Tensor& u) { return add_rms_norm(x, u, norm, eps); };
  if (!wants_grad(weight)) {
    const auto [normed, sum] = make(residual, update);
    return {affine(normed, weight, bias, /*needs_value=*/true, in_float8), sum};
  }
  const variable_list made =
      apply(make, residual, update, at::TensorList(norm), weight, bias, /*needs_value=*/true, in_float8);
  return {made[0], made[1]};
}

at::Tensor recompute(Block block, const at::Tensor& x, const std::vector<at::Tensor>& parameters, Hold hold,
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
