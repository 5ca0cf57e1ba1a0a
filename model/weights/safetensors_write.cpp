#include "base/error.h"
#include "model/weights/safetensors.h"
#include "model/weights/safetensors_types.h"

namespace caldera {
namespace {

at::ScalarType type_in_file(const at::Tensor& tensor, std::optional<at::ScalarType> dtype) {
  return dtype && at::isFloatingType(tensor.scalar_type()) ? *dtype : tensor.scalar_type();
}

int64_t bytes_in_file(const at::Tensor& tensor, std::optional<at::ScalarType> dtype) {
  return tensor.numel() * static_cast<int64_t>(c10::elementSize(type_in_file(tensor, dtype)));
}

std::string_view type_name(at::ScalarType type) {
  for (const SafetensorsType& known : kSafetensorsTypes)
    if (known.type == type) return known.name;
  throw Error(fmt::format("safetensors cannot hold tensors of type {}", c10::toString(type)));
}

}  // namespace

void write_safetensors(const fs::path& file, const TensorList& tensors,
                       const std::map<std::string, std::string>& metadata,
                       std::optional<at::ScalarType> dtype) {
  // Wide elements first, so that each tensor's data are aligned to its element; otherwise in the order given.
  std::vector<const TensorList::value_type*> order;
  for (const auto& item : tensors) order.push_back(&item);
  std::stable_sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    return c10::elementSize(type_in_file(a->second, dtype)) >
           c10::elementSize(type_in_file(b->second, dtype));
  });

  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    CALDERA_CHECK(!header.contains(name), Error, "{}: tensor {} is given twice", file.string(), name);
    const int64_t end = offset + bytes_in_file(tensor, dtype);
    header[name] = {{"dtype", type_name(type_in_file(tensor, dtype))},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');

  AtomicFile out(file);
  const uint64_t length = text.size();
  out.write(&length, sizeof length);
  out.write(text);
  for (const auto* item : order) {
    const at::Tensor& tensor = item->second;
    const at::Tensor bytes = tensor.detach().to(at::kCPU, type_in_file(tensor, dtype)).contiguous();
    out.write(bytes.const_data_ptr(), bytes.nbytes());
  }
  out.commit();
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
