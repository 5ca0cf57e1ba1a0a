// EfficientNet-Lite (Lite0 to Lite4): EfficientNet (arXiv 1905.11946) without squeeze-and-excitation and with
// ReLU6. Its last feature map, 7 x 7 x 1280 at 224 px for Lite0, is read as patches. A tower with frozen
// batch statistics. Legend: I images, C channels, Y/X rows and columns of a map, P = Y * X patches, D
// channels of the last map.

#include <cmath>

#include "base/aten.h"
#include "base/error.h"
#include "model/taps.h"
#include "model/vision/towers.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

constexpr const char* kEfficientNetWhere = "the EfficientNet-Lite tower's config.json";
// As the published models have them, whatever the width.
constexpr int64_t kStemChannels = 32, kHeadChannels = 1280, kTotalStride = 32;
constexpr double kNormEps = 1e-3;

// The stages of Lite0; width and depth scale channels and repeats.
struct StagePlan {
  int64_t repeats, kernel, stride, expand, in_channels, out_channels;
};
constexpr StagePlan kStages[] = {{1, 3, 1, 1, 32, 16},  {2, 3, 2, 6, 16, 24},  {2, 5, 2, 6, 24, 40},
                                 {3, 3, 2, 6, 40, 80},  {3, 5, 1, 6, 80, 112}, {4, 5, 2, 6, 112, 192},
                                 {1, 3, 1, 6, 192, 320}};

int64_t scale_channels(int64_t channels, double width) {
  constexpr int64_t kDivisor = 8;
  const double scaled = static_cast<double>(channels) * width;
  int64_t rounded = std::max(kDivisor, static_cast<int64_t>(scaled + kDivisor / 2.0) / kDivisor * kDivisor);
  if (static_cast<double>(rounded) < 0.9 * scaled) rounded += kDivisor;  // never 10 % below
  return rounded;
}

// A convolution without bias and the batch norm behind it.
struct ConvNorm {
  at::Tensor weight;                                             // [out, in / groups, kernel, kernel]
  at::Tensor norm_weight, norm_bias, running_mean, running_var;  // [out]
  int64_t stride = 1, groups = 1;

  ConvNorm() = default;
  ConvNorm(int64_t in_channels, int64_t out_channels, int64_t kernel, int64_t conv_stride,
           int64_t conv_groups)
      : weight(at::empty({out_channels, in_channels / conv_groups, kernel, kernel})),
        norm_weight(at::empty({out_channels})),
        norm_bias(at::empty({out_channels})),
        running_mean(at::empty({out_channels})),
        running_var(at::empty({out_channels})),
        stride(conv_stride),
        groups(conv_groups) {}

  // The norm is folded into the convolution: y = conv(x, weight * scale) + shift. In the dtype of x.
  at::Tensor forward(at::Tensor x_ICYX) const {
    const at::Tensor scale =
        norm_weight.to(at::kFloat) * at::rsqrt(running_var.detach().to(at::kFloat) + kNormEps);
    const at::Tensor shift = norm_bias.to(at::kFloat) - running_mean.detach().to(at::kFloat) * scale;
    const at::Tensor folded = (weight.to(at::kFloat) * scale.view({-1, 1, 1, 1})).to(x_ICYX.scalar_type());
    // TensorFlow's "same" padding: the odd row and column go to the bottom and the right.
    const int64_t kernel = weight.size(2), size = x_ICYX.size(2);
    const int64_t total = std::max<int64_t>(((size + stride - 1) / stride - 1) * stride + kernel - size, 0);
    int64_t padding = total / 2;
    if (total % 2 != 0) {
      x_ICYX = at::constant_pad_nd(x_ICYX, {padding, padding + 1, padding, padding + 1});
      padding = 0;
    }
    return at::conv2d(x_ICYX, folded, shift.to(x_ICYX.scalar_type()), stride, padding, 1, groups);
  }

  void list(NamedTensors& all, const std::string& name) {
    all.push_back({name + ".conv.weight", &weight});
    all.push_back({name + ".norm.weight", &norm_weight});
    all.push_back({name + ".norm.bias", &norm_bias});
    all.push_back({name + ".norm.running_mean", &running_mean});
    all.push_back({name + ".norm.running_var", &running_var});
  }
};

at::Tensor clamp_0_6(at::Tensor x) {
  return x.requires_grad() ? at::hardtanh(x, 0, 6) : at::hardtanh_(x, 0, 6);
}

struct InvertedResidual {
  bool has_expand = false, has_skip = false;
  ConvNorm expand, depthwise, project;

  at::Tensor forward(const at::Tensor& x_ICYX) const {
    at::Tensor h_ICYX = has_expand ? clamp_0_6(expand.forward(x_ICYX)) : x_ICYX;
    h_ICYX = project.forward(clamp_0_6(depthwise.forward(h_ICYX)));
    return has_skip ? h_ICYX + x_ICYX : h_ICYX;
  }
};

class EfficientNetLite : public VisionTower {
 public:
  EfficientNetLite(const Json& config, const Json& preprocessor, const VisionFeatures& features) {
    image_size_ = integer_field(config, kEfficientNetWhere, "image_size", 224, kTotalStride, 1 << 13);
    width_ = number_field(config, kEfficientNetWhere, "width_coefficient", 1.0);
    depth_ = number_field(config, kEfficientNetWhere, "depth_coefficient", 1.0);
    for (const double coefficient : {width_, depth_})
      CALDERA_CHECK(coefficient > 0 && coefficient <= 4, CheckpointError,
                    "{}: width_coefficient and depth_coefficient: expected numbers in (0, 4], got {}", kEfficientNetWhere,
                    coefficient);
    drops_class_token(
        features);  // there is no class token: either choice gives all patches, a third is refused
    spec_ = image_spec_from(preprocessor, {});
    set_image_size(image_size_);
    build();
  }

  at::Tensor forward(const at::Tensor& pixels_ICYX) override {
    check_pixels(pixels_ICYX, spec_);
    // On the CPU convolutions in bfloat16 are slower than in float32.
    const at::ScalarType dtype = stem_.weight.scalar_type(),
                         compute = stem_.weight.is_cpu() ? at::kFloat : dtype;
    at::Tensor x_ICYX = normalize_pixels(pixels_ICYX, spec_, compute);
    x_ICYX = clamp_0_6(stem_.forward(x_ICYX.contiguous(at::MemoryFormat::ChannelsLast)));
    tap("vision_tower.embeddings", x_ICYX);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      x_ICYX = blocks_[i].forward(x_ICYX);
      tap("vision_tower.layers", i, x_ICYX);
    }
    return clamp_0_6(head_.forward(x_ICYX)).flatten(2).transpose(1, 2).to(dtype);  // [I, P, D]
  }

  NamedTensors tensors() override {
    NamedTensors all;
    stem_.list(all, "stem");
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const std::string prefix = fmt::format("blocks.{}.", i);
      if (blocks_[i].has_expand) blocks_[i].expand.list(all, prefix + "expand");
      blocks_[i].depthwise.list(all, prefix + "depthwise");
      blocks_[i].project.list(all, prefix + "project");
    }
    head_.list(all, "head");
    return all;
  }

  void set_image_size(int64_t image_size) override {  // a convolution has no positions
    check_image_size(image_size, kTotalStride);
    image_size_ = spec_.image_size = image_size;
    const int64_t grid = (image_size + kTotalStride - 1) / kTotalStride;
    spec_.num_image_tokens = grid * grid;
  }

  ImageSpec image_spec() const override { return spec_; }
  int64_t hidden_size() const override { return kHeadChannels; }
  const char* id() const override { return "efficientnet_lite"; }
  Json config() const override {
    return {{"model_type", "efficientnet_lite"},
            {"image_size", image_size_},
            {"width_coefficient", width_},
            {"depth_coefficient", depth_},
            {"hidden_size", kHeadChannels}};
  }

 private:
  void build() {
    stem_ = ConvNorm(3, kStemChannels, 3, 2, 1);
    const size_t num_stages = std::size(kStages);
    int64_t channels = kStemChannels;
    for (size_t s = 0; s < num_stages; ++s) {
      const StagePlan& plan = kStages[s];
      const bool fixed_depth = s == 0 || s + 1 == num_stages;
      const int64_t repeats =
          fixed_depth ? plan.repeats
                      : static_cast<int64_t>(std::ceil(depth_ * static_cast<double>(plan.repeats)));
      const int64_t out_channels = scale_channels(plan.out_channels, width_);
      for (int64_t r = 0; r < repeats; ++r) {
        const int64_t inner = channels * plan.expand, stride = r == 0 ? plan.stride : 1;
        InvertedResidual block;
        block.has_expand = plan.expand != 1;
        if (block.has_expand) block.expand = ConvNorm(channels, inner, 1, 1, 1);
        block.depthwise = ConvNorm(inner, inner, plan.kernel, stride, inner);
        block.project = ConvNorm(inner, out_channels, 1, 1, 1);
        block.has_skip = stride == 1 && channels == out_channels;
        blocks_.push_back(std::move(block));
        channels = out_channels;
      }
    }
    head_ = ConvNorm(channels, kHeadChannels, 1, 1, 1);
  }

  int64_t image_size_ = 224;
  double width_ = 1, depth_ = 1;
  ImageSpec spec_;
  ConvNorm stem_, head_;
  std::vector<InvertedResidual> blocks_;
};

std::unique_ptr<VisionTower> make_efficientnet_lite(const Json& config, const Json& preprocessor,
                                                    const VisionFeatures& features) {
  return std::make_unique<EfficientNetLite>(config, preprocessor, features);
}

// He's rule for the convolutions, the identity for the norms.
void init_efficientnet_lite(VisionTower& tower, uint64_t seed) {
  for (NamedTensor& named : tower.tensors()) {
    at::Tensor value = named.value();
    if (named.name.ends_with("conv.weight"))
      init_normal_(value, std::sqrt(2.0 / static_cast<double>(value.numel() / value.size(0))), seed,
                   named.name);
    else
      value.fill_(named.name.ends_with("norm.weight") || named.name.ends_with("running_var") ? 1.0 : 0.0);
  }
}

}  // namespace

const VisionTowerSpec& efficientnet_lite_spec() {
  static const VisionTowerSpec spec{
      "efficientnet_lite", {"efficientnet_lite"}, make_efficientnet_lite, init_efficientnet_lite, false};
  return spec;
}

}  // namespace caldera
