#include "model/ops/autograd.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

// A dropout(x) * scaling.
at::Tensor down_product(const at::Tensor& x, const LowRankUpdate& update, double scaling,
                        const Dropout& dropout) {
  return affine(dropped_out(x, dropout, update.dropout_seed), update.a_RI).mul_(scaling);
}

// y[:, update's rows] += u b^T.
void add_update(const at::Tensor& y, const LowRankUpdate& update, const at::Tensor& u) {
  at::Tensor rows = y.narrow(1, update.first_row, update.b_OR.size(0));
  if (y.is_cuda())
    rows.addmm_(u, update.b_OR.t());
  else
    rows.add_(matrix_product(u, update.b_OR.t()));
}

struct Updates : torch::CustomClassHolder {
  Updates(std::vector<LowRankUpdate> updates, Dropout how)
      : list(std::move(updates)), dropout(std::move(how)) {}
  std::vector<LowRankUpdate> list;
  Dropout dropout;
};

struct AddLowRankFunction : torch::autograd::Function<AddLowRankFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const at::Tensor& x,
                            const std::vector<LowRankUpdate>& updates, double scaling, const Dropout& dropout,
                            bool needs_value, at::TensorList matrices) {
    variable_list saved = {x};
    saved.insert(saved.end(), matrices.begin(), matrices.end());
    std::vector<LowRankUpdate> places;  // without the matrices: those are saved as autograd wants it
    for (const LowRankUpdate& update : updates) {
      const at::Tensor u = down_product(x, update, scaling, dropout);
      if (needs_value) add_update(y, update, u);
      saved.push_back(u);
      places.push_back({{}, {}, update.first_row, update.dropout_seed});
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["updates"] =
        c10::IValue::make_capsule(c10::make_intrusive<Updates>(std::move(places), dropout));
    ctx->saved_data["scaling"] = scaling;
    ctx->mark_dirty({y});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto kept = c10::static_intrusive_pointer_cast<Updates>(ctx->saved_data["updates"].toCapsule());
    const std::vector<LowRankUpdate>& updates = kept->list;
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const at::Tensor &x = saved[0], &dy = grads[0];
    at::Tensor dx;
    variable_list of_matrices;
    for (size_t i = 0; i < updates.size(); ++i) {
      const at::Tensor &a = saved[1 + 2 * i], &b = saved[2 + 2 * i], &u = saved[1 + 2 * updates.size() + i];
      const at::Tensor rows = dy.narrow(1, updates[i].first_row, b.size(0));
      const at::Tensor du = matrix_product(rows, b).mul_(scaling);
      const uint64_t seed = updates[i].dropout_seed;
      of_matrices.push_back(matrix_product(du.t(), dropped_out(x, kept->dropout, seed)));
      of_matrices.push_back(matrix_product(rows.t(), u));
      if (!ctx->needs_input_grad(1)) continue;
      if (dx.defined() && kept->dropout.p == 0) {
        matrix_product_into(du, a, dx, /*accumulate=*/true);
        continue;
      }
      const at::Tensor part = dropped_out(matrix_product(du, a), kept->dropout, seed);
      dx = dx.defined() ? dx.add_(part) : part;
    }
    variable_list result = {dy, dx, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
    result.insert(result.end(), of_matrices.begin(), of_matrices.end());
    return result;
  }
};

}  // namespace

at::Tensor add_low_rank_(const at::Tensor& y_TO, const at::Tensor& x_TI,
                         const std::vector<LowRankUpdate>& updates, double scaling, const Dropout& dropout,
                         bool needs_value) {
  CALDERA_PROFILED("add_low_rank_");
  std::vector<at::Tensor> matrices;
  bool differentiable = wants_grad(y_TO) || wants_grad(x_TI);
  for (const LowRankUpdate& update : updates) {
    matrices.insert(matrices.end(), {update.a_RI, update.b_OR});
    differentiable = differentiable || wants_grad(update.a_RI) || wants_grad(update.b_OR);
  }
  if (differentiable)
    return AddLowRankFunction::apply(y_TO, x_TI, updates, scaling, dropout, needs_value,
                                     at::TensorList(matrices));
  const at::NoGradGuard no_grad;
  for (const LowRankUpdate& update : updates)
    if (needs_value) add_update(y_TO, update, down_product(x_TI, update, scaling, dropout));
  return y_TO;
}

}  // namespace caldera
