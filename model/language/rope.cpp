#include "model/language/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"
#include "base/strings.h"

namespace caldera {
namespace {

double number(const Json& parameters, const char* key, const std::string& type) {
  const auto found = parameters.find(key);
  CALDERA_CHECK(found != parameters.end() && found->is_number(), CheckpointError,
                "config.json: rope type \"{}\" needs the number \"{}\" in rope_parameters (or rope_scaling)",
                type, key);
  return found->get<double>();
}

double number_or(const Json& parameters, const char* key, double fallback) {
  const auto found = parameters.find(key);
  return found != parameters.end() && found->is_number() ? found->get<double>() : fallback;
}

// Both spellings as transformers 5's one object.
Json rope_parameters(const Json& config) {
  Json given = Json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!config.contains(key) || !config[key].is_object() || config[key].empty()) continue;
    given = config[key];
    break;
  }
  Json parameters;
  parameters["rope_theta"] =
      given.contains("rope_theta") ? given["rope_theta"] : config.value("rope_theta", Json(10000.0));
  parameters["rope_type"] =
      given.contains("rope_type") ? given["rope_type"] : given.value("type", Json("default"));
  given.erase("type");
  for (const auto& [key, value] : given.items()) parameters[key] = value;
  return parameters;
}

// Llama 3.1: long wavelengths are stretched by `factor`, short ones left, those between blended.
at::Tensor llama3_inv_freq(const at::Tensor& inv_freq, const Json& parameters) {
  const double factor = number(parameters, "factor", "llama3");
  const double low = number(parameters, "low_freq_factor", "llama3");
  const double high = number(parameters, "high_freq_factor", "llama3");
  const double old_length = number(parameters, "original_max_position_embeddings", "llama3");
  CALDERA_CHECK(factor >= 1 && low > 0 && high > low && old_length > 0, CheckpointError,
                "config.json: rope type \"llama3\": expected factor >= 1 and 0 < low_freq_factor < "
                "high_freq_factor, got "
                "{}, {}, {}",
                factor, low, high);
  const at::Tensor wavelength = 2 * std::numbers::pi / inv_freq;
  const at::Tensor stretched = at::where(wavelength > old_length / low, inv_freq / factor, inv_freq);
  const at::Tensor smooth = (old_length / wavelength - low) / (high - low);
  const at::Tensor blended = (1 - smooth) * stretched / factor + smooth * stretched;
  const at::Tensor between = (wavelength >= old_length / high).logical_and(wavelength <= old_length / low);
  return at::where(between, blended, stretched);
}

// YaRN (Peng et al., arXiv 2309.00071): interpolation below a frequency, extrapolation above, a ramp between.
at::Tensor yarn_inv_freq(const at::Tensor& inv_freq, const Json& parameters, int64_t head_dim, double base,
                         double max_positions, double* attention_scaling) {
  const double factor = number(parameters, "factor", "yarn");
  const double old_length = number_or(parameters, "original_max_position_embeddings", max_positions);
  const auto dim = static_cast<double>(head_dim);
  const auto mscale = [factor](double weight) {
    return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
  };
  const double numerator = number_or(parameters, "mscale", 0),
               denominator = number_or(parameters, "mscale_all_dim", 0);
  const double scaling =
      numerator != 0 && denominator != 0 ? mscale(numerator) / mscale(denominator) : mscale(1.0);
  *attention_scaling = number_or(parameters, "attention_factor", scaling);

  const auto correction = [&](double rotations) {
    return dim * std::log(old_length / (rotations * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  double low = correction(number_or(parameters, "beta_fast", 32)),
         high = correction(number_or(parameters, "beta_slow", 1));
  if (parameters.value("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  const at::Tensor ramp = ((at::arange(head_dim / 2, at::kFloat) - low) / (high - low)).clamp(0, 1);
  return inv_freq / factor * ramp + inv_freq * (1 - ramp);
}

}  // namespace

Rope make_rope(const Json& config, int64_t head_dim, int64_t max_position_embeddings) {
  Rope rope;
  rope.parameters = rope_parameters(config);
  const Json& parameters = rope.parameters;
  CALDERA_CHECK(parameters["rope_type"].is_string(), CheckpointError,
                "config.json: rope_type: expected text, got {}", parameters["rope_type"].dump());
  const std::string type = parameters["rope_type"];
  CALDERA_CHECK(
      number_or(parameters, "partial_rotary_factor", number_or(config, "partial_rotary_factor", 1)) == 1,
      CheckpointError, "config.json: partial_rotary_factor other than 1 is not supported");
  const double base = number(parameters, "rope_theta", type);
  CALDERA_CHECK(base > 1, CheckpointError, "config.json: rope_theta: expected a number above 1, got {}",
                base);

  const at::Tensor exponents =
      at::arange(0, head_dim, 2, at::kLong).to(at::kFloat) / static_cast<double>(head_dim);
  rope.inv_freq = 1.0 / at::pow(base, exponents);
  if (type == "linear") {
    rope.inv_freq = rope.inv_freq / number(parameters, "factor", type);
  } else if (type == "llama3") {
    rope.inv_freq = llama3_inv_freq(rope.inv_freq, parameters);
  } else if (type == "yarn") {
    rope.inv_freq = yarn_inv_freq(rope.inv_freq, parameters, head_dim, base,
                                  static_cast<double>(max_position_embeddings), &rope.attention_scaling);
  } else {
    CALDERA_CHECK(type == "default", CheckpointError, "config.json: rope_type \"{}\" is not supported{}",
                  type, suggestion(type, {"default", "linear", "llama3", "yarn"}));
  }
  return rope;
}

}  // namespace caldera
