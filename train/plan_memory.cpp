#include "train/plan_memory.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "model/ops/dynamic_map.h"
#include "model/ops/gemm.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "model/ops/widened_product.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"
#include "model/weights/load.h"
#include "train/stage.h"

// Legend, besides the header's: T tokens of a micro-batch, N of them supervised, P image tokens among them.
namespace caldera {
namespace {

constexpr int64_t kAttentionRows = 256;  // queries whose scores exist at once
constexpr int64_t kGpuLibraryBytes = 64 << 20;  // cuBLAS's workspaces

Json decoder_config(const fs::path& path) {
  if (fs::is_regular_file(path)) return open_gguf_decoder(path).config;
  const fs::path file = path / "config.json";
  const Json config = read_config(file);
  return is_hf_llava(config) ? hf_text_config(config, file.string()) : config;
}

int64_t weight_file_bytes(const fs::path& path) {
  if (fs::is_regular_file(path)) return static_cast<int64_t>(fs::file_size(path));
  int64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".safetensors" || extension == ".bin")
      bytes += static_cast<int64_t>(fs::file_size(entry.path()));
  }
  return bytes;
}

// Elements that a block keeps for backward, for each row before and after its attention, and of its MLP. Norms and
// the gated product are not kept where a plain product follows: backward makes them again.
struct Kept {
  int64_t before, after, mlp;
};
Kept kept_of(const PlannedModel& p, bool on_gpu) {
  Kept kept{p.D + (p.H + 2 * p.G) * p.K, p.D, 2 * p.F};
  if (p.norms_heads) kept.before += (p.H + p.G) * p.K;  // q and k before their norms
  // The attention's output, for its projection's gradient; flash attention's own backward wants it, too.
  if (p.language_trains || on_gpu) kept.after += p.H * p.K;
  if (p.lora) {  // the inputs, and what the first of each adapter's two products makes of them
    kept.before += p.D + 3 * p.lora_r;
    kept.after += p.lora_r;
    kept.mlp += p.D + p.F + 3 * p.lora_r;
  }
  return kept;
}

}  // namespace

PlannedModel plan_model(const Recipe& recipe, const StageConfig& stage) {
  PlannedModel p;
  const VisionFeatures features{recipe.model.vision_feature_layer,
                                recipe.model.vision_feature_select_strategy};
  LlavaModel& model = p.model;
  model.vision =
      make_vision_tower(fs::absolute(recipe.model.vision_tower), features, recipe.model.image_size);
  const Json config = decoder_config(recipe.model.language_model);
  const std::string type = config.value("model_type", "");
  model.language = find_language_model(type, recipe.model.language_model).make(config);
  model.projector = make_projector(recipe.model.mm_projector_type, model.vision->hidden_size(),
                                   model.language->hidden_size());
  p.lora = stage.uses_lora();
  if (p.lora) {
    p.lora_r = stage.lora->lora_r;
    for (Linear* linear : model.language->linears()) linear->attach(*stage.lora, recipe.seed);
  }

  const Json text = model.language->config();
  p.D = model.language->hidden_size();
  p.V = model.language->vocab_size();
  p.L = model.language->num_blocks();
  p.H = text.at("num_attention_heads").get<int64_t>();
  p.G = text.value("num_key_value_heads", p.H);
  p.F = text.at("intermediate_size").get<int64_t>();
  p.K =
      text.contains("head_dim") && text["head_dim"].is_number() ? text["head_dim"].get<int64_t>() : p.D / p.H;
  p.is_tied = text.value("tie_word_embeddings", false);
  p.num_parameters = count_parameters(model.tensors());
  if (stage.uses_4bit()) {
    for (Linear* linear : model.language->linears()) {
      linear->quantize_nf4(stage.lora->double_quant, at::kMeta);
      const Nf4Weight& weight = *linear->nf4();
      p.nf4_bytes += weight.num_bytes();
      p.nf4_matrix = std::max(p.nf4_matrix, weight.num_outputs() * weight.num_inputs());
    }
    p.nf4_parameters = p.num_parameters - count_parameters(model.tensors());
  }
  p.file_bytes = weight_file_bytes(recipe.model.language_model);
  p.tower_width = model.vision->hidden_size();
  p.projector_kept = std::max<int64_t>(0, std::ssize(model.projector->tensors()) / 2 - 1) * p.D;
  const Json vision = model.vision->config();
  if (vision.contains("intermediate_size") && vision.contains("num_hidden_layers"))
    p.tower_kept = vision["num_hidden_layers"].get<int64_t>() *
                   (8 * p.tower_width + 2 * vision["intermediate_size"].get<int64_t>());

  const NamedTensors language = model.component_tensors("language_model");
  p.norms_heads = std::any_of(language.begin(), language.end(), [](const NamedTensor& tensor) {
    return tensor.name.ends_with("q_norm.weight");
  });
  const auto of_first_block = [](NamedTensors tensors) {
    std::erase_if(tensors, [](const NamedTensor& tensor) {
      return tensor.name.find("model.layers.0.") == std::string::npos;
    });
    return count_parameters(tensors);
  };
  p.block_parameters = of_first_block(language);
  const std::vector<ParameterGroup> groups = parameter_groups(model, stage);
  const auto in_8bit = stage.optimizer.optim == "adamw_8bit" ? with_8bit_states(groups)
                                                             : std::unordered_set<const at::Tensor*>();
  std::unordered_set<const at::Tensor*> seen;
  for (const ParameterGroup& group : groups) {
    p.num_trainable += count_parameters(group.tensors);
    for (const NamedTensor& tensor : group.tensors) {
      if (!seen.insert(tensor.owner).second) continue;
      const int64_t count = tensor.owner->numel(), blocks = (count + kQuantizedBlock - 1) / kQuantizedBlock;
      p.state_bytes += in_8bit.contains(tensor.owner) ? 2 * (count + 4 * blocks) : 8 * count;
    }
    if (group.name == "vision_tower") p.tower_trains = true;
    if (group.name == "projector") p.projector_trains = true;
    if (group.name != "language_model") continue;
    p.language_trains = true;
    p.head_trains = p.embedding_trains = !p.lora;
    p.block_trainable = of_first_block(group.tensors);
  }
  p.packed_bytes = frozen_copy_bytes(model, groups, parse_dtype(stage.dtype));
  return p;
}

MemoryPlan plan_memory(const PlannedModel& p, const Recipe& recipe, const StageConfig& stage,
                       const StagePlan& numbers, bool on_gpu, int64_t program, const MemoryChoices& choices,
                       const RankSplit& ranks) {
  const int64_t e = stage.dtype == "float32" ? 4 : 2;
  const std::string& strategy = recipe.distributed.strategy;
  const int64_t sharers = ranks.num_shards, num_ranks = sharers * ranks.num_replicas;
  const int64_t T = numbers.largest_micro_batch;
  const auto share = [&](int64_t count) {
    return numbers.num_tokens == 0
               ? 0
               : std::min<int64_t>(
                     T, 1 + static_cast<int64_t>(static_cast<double>(T) * static_cast<double>(count) /
                                                 static_cast<double>(numbers.num_tokens)));
  };
  const int64_t N = share(numbers.num_supervised);
  const int64_t P = share(numbers.num_images * p.model.vision->image_spec().num_image_tokens);

  MemoryPlan fixed;
  fixed.program = program;
  const int64_t block_weights = p.L * p.block_parameters;
  const int64_t held_whole = p.num_parameters - p.nf4_parameters;
  fixed.weights = p.nf4_bytes + e * (strategy == "zero3" ? held_whole - block_weights + block_weights / sharers +
                                                               2 * p.block_parameters
                                                         : held_whole);
  if (choices.packs_frozen) fixed.packed = p.packed_bytes;
  const bool has_masters = e == 2 && stage.optimizer.master_weights == "float32";
  fixed.masters = has_masters ? 2 * p.num_trainable / sharers : 0;
  fixed.states = p.state_bytes / sharers;
  if (stage.memory.offload_optimizer && on_gpu) fixed.masters = fixed.states = 0;

  // Between micro-batches and ranks gradients are summed in float32; autograd adds float32 ones in place.
  const bool accumulates = numbers.micro_batches_per_step > 1 || num_ranks > 1;
  const int64_t keepers = strategy == "zero2" || strategy == "zero3" ? sharers : 1;
  const int64_t sums = accumulates ? 4 * p.num_trainable / keepers : 0;
  const bool is_fresh = !accumulates || (e == 2 && num_ranks == 1);  // new gradients stay beside the sums
  const int64_t embedding = p.V * p.D * e;
  const int64_t head_gradient = p.head_trains ? embedding : 0;
  const int64_t kept_head = is_fresh ? head_gradient : 0;
  const int64_t block_gradient = is_fresh ? e * p.block_trainable : 0;

  const Kept kept = kept_of(p, on_gpu);
  const int64_t input = T * p.D * e;
  const auto rows_of_mlp = [&](int64_t layer) { return layer + 1 == p.L ? N : T; };
  const auto mlp_of = [&](int64_t layer) { return rows_of_mlp(layer) * kept.mlp * e; };
  const auto block_of = [&](int64_t layer) {
    return (T * kept.before + rows_of_mlp(layer) * kept.after) * e + mlp_of(layer);
  };
  const auto recomputed = [&](int64_t layer) { return recomputed_of(choices.recomputed_halves, layer, p.L); };
  const auto offloads = [&](int64_t layer) {
    return is_offloaded(recomputed(layer), choices.offloaded_inputs, layer, p.L);
  };
  const auto kept_by = [&](int64_t layer) {
    if (offloads(layer)) return int64_t{0};
    if (recomputed(layer) == Recomputed::kBlock) return input;
    return block_of(layer) - (recomputed(layer) == Recomputed::kMlp ? mlp_of(layer) : 0);
  };
  int64_t before_blocks =
      input;  // the embedded row, what the projector keeps and, where it trains, the tower
  if (p.projector_trains) before_blocks += P * (p.tower_width + p.projector_kept) * e;
  if (p.tower_trains) before_blocks += P * p.tower_kept * e;
  const int64_t longest = std::min(numbers.longest, T), rows = std::min(kAttentionRows, longest);
  // On a GPU: sums of q's gradients in float32, gradients of k and v for each query head, and the libraries' own.
  const int64_t attention =
      on_gpu ? (4 + (p.G < p.H ? 2 * e : 0)) * T * p.H * p.K + kGpuLibraryBytes
             : at::get_num_threads() * (2 * p.H * rows * longest * e + (p.H + 2 * p.G) * longest * p.K * (e + 4));

  // What a checkpoint is written from, in host memory: in the background what is not written by the next update, at
  // worst all; else the masters where they are kept in parts.
  const bool saves = !on_gpu && stage.save_steps > 0 && stage.save_steps < numbers.num_steps;
  const bool in_background = saves && stage.async_save;
  const int64_t saved_masters = saves && (in_background || sharers > 1) ? 4 * p.num_trainable : 0;
  const int64_t beside = in_background ? saved_masters + p.state_bytes / sharers : 0;

  // What the products of a linear layer make of their factors where the CPU multiplies in float32; what our
  // own products keep from one to the next.
  const ProductWay way = on_gpu ? ProductWay::kAten : product_way(parse_dtype(stage.dtype));
  const bool widens = way == ProductWay::kWidened;
  const int64_t kept_by_products = way == ProductWay::kOwn ? gemm::most_kept_bytes(at::get_num_threads()) : 0;
  const auto widened = [&](int64_t count, int64_t in, int64_t out) {
    return !widens || count == 0 ? 0
                                 : std::max({widened_product_bytes(count, in, out), widened_product_bytes(count, out, in),
                                             widened_product_bytes(out, count, in)});
  };

  MemoryPlan most;
  const auto consider = [&](const std::string& moment, int64_t gradients, int64_t activations,
                            int64_t workspace) {
    MemoryPlan at = fixed;
    at.moment = moment;
    at.gradients = gradients;
    at.activations = activations;
    at.workspace = workspace + beside + kept_by_products;
    if (at.total() > most.total()) most = at;
  };
  // The whole model is read as float32 beside the decoder's file, then rounded; a GPU sees it after that.
  if (!on_gpu) {
    most.moment = "loading the weights";
    most.program = program;
    most.weights = 4 * p.num_parameters;
    most.workspace = p.file_bytes;
  }

  int64_t all_kept = before_blocks;
  for (int64_t layer = 0; layer < p.L; ++layer) all_kept += kept_by(layer);
  // Logits of one chunk; several chunks' gradients of a bfloat16 head are summed in float32.
  const int64_t chunk = cross_entropy_chunk(N, p.V, e);
  const int64_t head_sum = chunk < N && e == 2 && p.head_trains ? 4 * p.V * p.D : 0;
  const int64_t leaving = offloads(0) ? input : 0;  // for host memory
  consider("the head", sums + head_gradient, all_kept + leaving + 3 * N * p.D * e,
           chunk * p.V * e + head_sum + widened(chunk, p.D, p.V));
  if (p.num_trainable == 0) return most;
  int64_t held = all_kept;
  for (int64_t layer = p.L; layer-- > 0;) {
    const int64_t gradients = sums + kept_head + (p.L - 1 - layer) * block_gradient;
    const Recomputed part = recomputed(layer);
    const int64_t on_its_way = offloads(layer) && layer > 0 ? input : 0;  // the next block's, from host memory
    const int64_t again =
        on_its_way + (part == Recomputed::kBlock ? block_of(layer) : part == Recomputed::kMlp ? mlp_of(layer) : 0);
    const int64_t wide = rows_of_mlp(layer);
    const std::string moment = fmt::format("backward of block {} of {}", layer + 1, p.L);
    // Its MLP: the gated product again, its gradient and that of gate and up; then its attention and the
    // fused projection.
    // What a product makes of its factors: a weight out of its 4 bits; both in 8-bit floats, by way of float32.
    const int64_t converted = p.nf4_matrix * e + (stage.float8 ? 5 * 2 * p.F * (p.D + T) : 0);
    consider(moment, gradients, held + again,
             (wide * 4 * p.F + 2 * T * p.D) * e + converted + widened(wide, p.D, 2 * p.F));
    const int64_t inner = again > 0 ? again : kept_by(layer);
    consider(moment, gradients + block_gradient, held + again - std::min(inner, wide * 2 * p.F * e),
             T * (2 * (p.H + 2 * p.G) * p.K + 2 * p.D) * e + attention + converted +
                 widened(T, p.D, (p.H + 2 * p.G) * p.K));
    held -= kept_by(layer);
  }
  // The embedding's gradient comes last; where it is the head's too, one is added to the other.
  const int64_t all_gradients = sums + (is_fresh ? e * p.num_trainable : 0);
  const bool adds = p.embedding_trains && (p.is_tied || !is_fresh);
  consider("the embedding's gradient", all_gradients, before_blocks, adds ? embedding : 0);
  consider("the update", all_gradients, 0, 0);
  if (!in_background) consider("saving a checkpoint", 0, 0, saved_masters);
  return most;
}

}  // namespace caldera
