#include "model/ops/dynamic_map.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"

namespace caldera {
namespace {

// As create_dynamic_map(signed, max_exponent_bits=7, total_bits=8), rounding included: decade i, from 10^-6
// to 1, is cut into 2^i equal parts (unsigned: twice as many) whose middles are values.
std::array<float, 256> make_map(bool is_signed) {
  constexpr int kDecades = 7;
  std::vector<float> values = {0.0f, 1.0f};
  for (int decade = 0; decade < kDecades; ++decade) {
    const int64_t parts = (1 << decade) * (is_signed ? 1 : 2);
    const at::Tensor borders = at::linspace(0.1, 1.0, parts + 1, at::kFloat);
    const at::Tensor middle = (borders.narrow(0, 0, parts) + borders.narrow(0, 1, parts)) / 2.0 *
                              std::pow(10.0, decade - kDecades + 1);
    for (int64_t part = 0; part < parts; ++part) {
      values.push_back(middle[part].item<float>());
      if (is_signed) values.push_back(-values.back());
    }
  }
  std::array<float, 256> map;
  CALDERA_ASSERT(values.size() == map.size());
  std::sort(values.begin(), values.end());
  std::copy(values.begin(), values.end(), map.begin());
  return map;
}

// middles[i] lies between values i and i + 1.
std::vector<float> middles(const std::array<float, 256>& map) {
  std::vector<float> list;
  for (size_t i = 0; i + 1 < map.size(); ++i) list.push_back((map[i] + map[i + 1]) / 2);
  return list;
}

at::Tensor on(const at::Tensor& like, const float* data, size_t count) {
  return at::tensor(at::ArrayRef<float>(data, count), at::kFloat).to(like.device());
}

}  // namespace

const std::array<float, 256>& dynamic_map(bool is_signed) {
  static const std::array<float, 256> with_sign = make_map(true), without = make_map(false);
  return is_signed ? with_sign : without;
}

Quantized quantize_dynamic(const at::Tensor& values, bool is_signed) {
  const at::NoGradGuard no_grad;
  const int64_t count = values.numel(), blocks = (count + kQuantizedBlock - 1) / kQuantizedBlock;
  const at::Tensor padded =
      at::constant_pad_nd(values.reshape(-1), {0, blocks * kQuantizedBlock - count}).view({blocks, -1});
  const at::Tensor scale = padded.abs().amax(1);
  const at::Tensor unit = padded * (1.0 / scale.clamp_min(std::numeric_limits<float>::min())).unsqueeze(1);
  const std::vector<float> borders = middles(dynamic_map(is_signed));
  const at::Tensor codes = at::bucketize(unit, on(values, borders.data(), borders.size()));
  return {codes.view(-1).narrow(0, 0, count).to(at::kByte).view(values.sizes()), scale};
}

at::Tensor dequantize_dynamic(const Quantized& quantized, bool is_signed) {
  const at::NoGradGuard no_grad;
  const std::array<float, 256>& map = dynamic_map(is_signed);
  const at::Tensor unit =
      on(quantized.codes, map.data(), map.size()).index({quantized.codes.reshape(-1).to(at::kLong)});
  const at::Tensor scale = quantized.scale.repeat_interleave(kQuantizedBlock).narrow(0, 0, unit.numel());
  return (unit * scale).view(quantized.codes.sizes());
}

CodeSearch::CodeSearch(bool is_signed) {
  const std::array<float, 256>& map = dynamic_map(is_signed);
  const std::vector<float> borders = middles(map);
  std::copy(map.begin(), map.end(), table_.values);
  std::fill(std::begin(table_.middles), std::end(table_.middles), std::numeric_limits<float>::infinity());
  std::copy(borders.begin(), borders.end(), table_.middles);
  const auto nearest = [&](float value) {
    return static_cast<uint8_t>(std::lower_bound(borders.begin(), borders.end(), value) - borders.begin());
  };
  for (int cell = 0; cell < kNumCells; ++cell) {
    const auto from =
        cell == 0 ? 0.0f : __builtin_bit_cast(float, static_cast<uint32_t>(cell + kFirstCell) << 16);
    const auto to = __builtin_bit_cast(float, (static_cast<uint32_t>(cell + kFirstCell + 1) << 16) - 1);
    table_.lowest[cell] = nearest(from);
    table_.lowest[cell + kNumCells] = nearest(-to);
    CALDERA_ASSERT(nearest(to) - nearest(from) <= 1 && nearest(-from) - nearest(-to) <= 1);
  }
}

const CodeSearch& CodeSearch::of(bool is_signed) {
  static const CodeSearch with_sign(true), without(false);
  return is_signed ? with_sign : without;
}

CodeTables code_tables() {
  const CodeTable<2>& without_sign = CodeSearch::of(false).table();
  CodeTables tables{.exp_avg = CodeSearch::of(true).table(), .exp_avg_sq = {}};
  std::copy(std::begin(without_sign.values), std::end(without_sign.values), tables.exp_avg_sq.values);
  std::copy(std::begin(without_sign.middles), std::end(without_sign.middles), tables.exp_avg_sq.middles);
  std::copy_n(without_sign.lowest, kNumCells, tables.exp_avg_sq.lowest);
  return tables;
}

const CodeTables* code_tables_on(at::Device device) {
  CALDERA_ASSERT(device.is_cuda());
  thread_local at::Tensor last;
  if (!last.defined() || last.device() != device) {
    CodeTables tables = code_tables();
    last = at::from_blob(&tables, {static_cast<int64_t>(sizeof(tables))}, at::kByte).to(device);
  }
  return static_cast<const CodeTables*>(last.const_data_ptr());
}

}  // namespace caldera
