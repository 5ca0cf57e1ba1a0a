#include "base/error.h"
#include "model/weights/safetensors.h"
#include "model/weights/safetensors_types.h"

namespace caldera {
namespace {

at::ScalarType type_in_file(at::ScalarType type, std::optional<at::ScalarType> dtype) {
  return dtype && at::isFloatingType(type) ? *dtype : type;
}

int64_t element_size(at::ScalarType type) { return static_cast<int64_t>(c10::elementSize(type)); }

int64_t bytes_in_file(const at::Tensor& tensor, std::optional<at::ScalarType> dtype) {
  return tensor.numel() * element_size(type_in_file(tensor.scalar_type(), dtype));
}

std::string_view safetensors_name(at::ScalarType type) {
  for (const SafetensorsType& known : kSafetensorsTypes)
    if (known.type == type) return known.name;
  throw Error(fmt::format("safetensors cannot hold tensors of type {}", c10::toString(type)));
}

}  // namespace

WrittenFile write_safetensors(const fs::path& file, const std::vector<TensorToWrite>& tensors,
                              const std::map<std::string, std::string>& metadata,
                              std::optional<at::ScalarType> dtype) {
  // Wide elements first, so that each tensor's data are aligned to its element; otherwise in the order given.
  std::vector<const TensorToWrite*> order;
  for (const TensorToWrite& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    return element_size(type_in_file(a->type, dtype)) > element_size(type_in_file(b->type, dtype));
  });

  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const TensorToWrite* tensor : order) {
    CALDERA_CHECK(!header.contains(tensor->name), Error, "{}: tensor {} is given twice", file.string(),
                  tensor->name);
    const at::ScalarType type = type_in_file(tensor->type, dtype);
    const int64_t end = offset + c10::multiply_integers(tensor->shape) * element_size(type);
    header[tensor->name] = {{"dtype", safetensors_name(type)}, {"shape", tensor->shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');

  const uint64_t length = text.size(), num_bytes = sizeof length + length + static_cast<uint64_t>(offset);
  AtomicFile out(file, num_bytes);
  out.write(&length, sizeof length);
  out.write(text);
  for (const TensorToWrite* tensor : order) {
    const at::Tensor values = tensor->read();
    CALDERA_ASSERT(values.sizes() == tensor->shape && values.scalar_type() == tensor->type);
    const at::Tensor bytes = values.detach().to(at::kCPU, type_in_file(tensor->type, dtype)).contiguous();
    out.write(bytes.const_data_ptr(), bytes.nbytes());
  }
  out.commit();
  return {num_bytes, out.hash()};
}

void write_safetensors(const fs::path& file, const TensorList& tensors,
                       const std::map<std::string, std::string>& metadata,
                       std::optional<at::ScalarType> dtype) {
  std::vector<TensorToWrite> list;
  for (const auto& [name, tensor] : tensors)
    list.push_back({name, tensor.sizes().vec(), tensor.scalar_type(), [&tensor = tensor] { return tensor; }});
  write_safetensors(file, list, metadata, dtype);
}

void write_weights_folder(const fs::path& folder, const TensorList& tensors, int64_t max_shard_bytes,
                          std::optional<at::ScalarType> dtype) {
  std::vector<TensorList> shards(1);
  int64_t shard_bytes = 0, total_bytes = 0;
  for (const auto& item : tensors) {
    const int64_t num_bytes = bytes_in_file(item.second, dtype);
    if (!shards.back().empty() && shard_bytes + num_bytes > max_shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shards.back().push_back(item);
    shard_bytes += num_bytes;
    total_bytes += num_bytes;
  }
  if (shards.size() == 1) {
    write_safetensors(folder / "model.safetensors", tensors, {{"format", "pt"}}, dtype);
    return;
  }
  Json weight_map = Json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    write_safetensors(folder / name, shards[i], {{"format", "pt"}}, dtype);
    for (const auto& item : shards[i]) weight_map[item.first] = name;
  }
  write_json(folder / "model.safetensors.index.json",
             {{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}});
  fs::remove(folder / "model.safetensors");  // readers would prefer it to the index
}

}  // namespace caldera
