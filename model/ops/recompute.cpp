#include <torch/csrc/autograd/autograd.h>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

using Block = std::function<at::Tensor(const at::Tensor&)>;

// Carries the block from forward to backward through the context.
struct BlockHolder : torch::CustomClassHolder {
  explicit BlockHolder(Block run) : block(std::move(run)) {}
  Block block;
};

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  static at::Tensor forward(AutogradContext* ctx, const Block& block, const at::Tensor& x,
                            at::TensorList parameters) {
    variable_list saved = {x};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["block"] = c10::IValue::make_capsule(c10::make_intrusive<BlockHolder>(block));
    return block(x);  // gradients are off in here: nothing inside is kept
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto holder = c10::static_intrusive_pointer_cast<BlockHolder>(ctx->saved_data["block"].toCapsule());
    const at::AutoGradMode record(true);
    const at::Tensor x = saved[0].detach().requires_grad_(saved[0].requires_grad());
    variable_list inputs;
    for (size_t i = 0; i < saved.size(); ++i) {
      const at::Tensor& input = i == 0 ? x : saved[i];
      if (input.requires_grad()) inputs.push_back(input);
    }
    const variable_list gradients =
        torch::autograd::grad({holder->block(x)}, inputs, grads, /*retain_graph=*/false,
                              /*create_graph=*/false, /*allow_unused=*/true);
    variable_list result = {at::Tensor()};  // the block itself
    size_t next = 0;
    for (const at::Tensor& input : saved)
      result.push_back(input.requires_grad() ? gradients[next++] : at::Tensor());
    return result;
  }
};

}  // namespace

at::Tensor recompute(Block block, const at::Tensor& x, const std::vector<at::Tensor>& parameters) {
  bool differentiable = wants_grad(x);
  for (const at::Tensor& parameter : parameters) differentiable = differentiable || wants_grad(parameter);
  if (!differentiable) return block(x);
  return RecomputeFunction::apply(block, x, at::TensorList(parameters));
}

}  // namespace caldera
