// A recipe: one YAML that holds a whole run. Names follow LLaVA and HF.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "data/record.h"
#include "model/lora.h"
#include "train/fields.h"

namespace caldera {

struct ModelConfig {
  std::string vision_tower;    // folder (HF CLIP, or ours), weights or config.json alone for a fresh one
  std::string language_model;  // HF folder or .gguf; config.json alone for a fresh one
  std::string mm_projector_type = "mlp2x_gelu";
  int64_t vision_feature_layer = -2;
  std::string vision_feature_select_strategy = "patch";
  int64_t image_size = 0;                // of the pictures, in pixels; 0: the tower's own
  std::string pretrain_mm_mlp_adapter;  // weights for the projector: LLaVA's mm_projector.bin, or a model's folder
  std::string tokenizer;  // default: the language model's
  std::vector<std::string> random_parts;  // may begin at random though no stage trains them
};

struct DataConfig {
  std::string data_path;  // LLaVA's JSON or JSONL
  std::string image_folder;
  std::vector<std::string> image_roots;  // folders that links in image_folder may lead to
  ImageFolder images() const { return {image_folder, {image_roots.begin(), image_roots.end()}}; }
  std::string eval_data_path;         // held-out samples for the validation loss; "" for none
  std::string conversation_template;  // LLaVA's --version: plain, v0, v1, llama_2, chatml
  std::string image_aspect_ratio = "square";
  int64_t model_max_length = 2048;
  bool group_by_modality_length = false;
  int64_t dataloader_num_workers = 2;
};

struct OptimizerConfig {
  std::string optim = "adamw_torch";       // HF's names: or "adamw_8bit"
  std::string master_weights = "float32";  // of a bfloat16 stage; or "none"
  double learning_rate = 1e-3;
  std::optional<double> mm_projector_lr;  // default: learning_rate
  std::optional<double> vision_tower_lr;
  double weight_decay = 0;
  double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  double max_grad_norm = 0;  // 0: no clipping, as published
  std::string lr_scheduler_type = "cosine";
  double warmup_ratio = 0.03;
  std::optional<int64_t> warmup_steps;        // goes before warmup_ratio
  std::optional<double> min_lr, min_lr_rate;  // of cosine_with_min_lr; one of them
};

// What a stage may do to take less memory; nothing of it changes what is computed.
struct MemoryConfig {
  double budget_gb = 0;  // > 0: as many blocks recompute as it takes to stay below
  bool offload_optimizer = false;
  bool offload_activations = false;
};

// How the language model learns where it has `lora`: its weights stay, low-rank adapters on its linear layers train.
struct LoraOptions : LoraConfig {
  bool lora_enable = true;
  std::string lora_bias = "none";
  bool load_in_4bit = false;  // QLoRA: the frozen weights as NF4
  bool double_quant = true;   // of its scales
};

struct StageConfig {
  std::string name;                    // "pretrain", "finetune"
  std::vector<std::string> trainable;  // of: projector, language_model, vision_tower
  std::optional<LoraOptions> lora;
  DataConfig data;
  OptimizerConfig optimizer;
  MemoryConfig memory;
  int64_t global_batch_size = 128;
  int64_t max_tokens_per_micro_batch = 8192;
  double num_train_epochs = 1;
  int64_t max_steps = 0;            // > 0: overrides num_train_epochs
  std::string loss = "token_mean";  // or "micro_batch_mean", LLaVA's
  std::string dtype = "float32";    // of compute: float32, bfloat16 or auto (choose_dtypes() in run.h)
  bool float8 = false;              // products of the decoder's linear layers
  bool gradient_checkpointing = false;
  int64_t save_steps = 500, save_total_limit = 1;
  bool save_best = false;
  bool async_save = false;
  int64_t eval_steps = 0;  // 0: at the end only

  bool uses_lora() const { return lora && lora->lora_enable; }
  bool uses_4bit() const { return uses_lora() && lora->load_in_4bit; }
};

// What a recipe measures at its end on held-out data (written to OUTPUT/results.json).
struct EvaluationConfig {
  std::string data_path;  // questions: one human turn and the expected answer a record, "type" for the table
  std::string captions_path;  // held-out samples for the loss with the right and with a shuffled picture;
                              // default data_path
  std::string image_folder;
  std::string conversation_template;
  int64_t max_questions = 1000;
  int64_t max_new_tokens = 32;
  int64_t num_sheet = 24;  // pictures on the sheet
};

// How several processes train together; nothing of it changes what is computed but for rounding.
struct DistributedConfig {
  std::string strategy = "ddp";          // ddp, zero1, zero2, zero3
  std::string shard_within = "world";    // or "node"
  std::string reduce_dtype = "float32";  // of gradients on their way
  double timeout_s = 600;
};

struct Recipe {
  ModelConfig model;
  std::vector<StageConfig> stages;
  std::optional<EvaluationConfig> evaluation;
  DistributedConfig distributed;
  std::string output;  // the run's folder
  uint64_t seed = 0;
  std::string device = "auto";  // auto, cpu, cuda
};

// Reads a recipe with overrides ("stages.pretrain.optimizer.learning_rate=1e-4"; a stage by its name or
// index). All faults are collected and thrown as one ConfigError, a line each: "FILE:LINE:COLUMN:
// path.of.key: what".
Recipe read_recipe(const std::filesystem::path& file, const std::vector<std::string>& overrides = {});
// The same of a text; `source` stands for the file in messages.
Recipe parse_recipe(const std::string& yaml, const std::string& source,
                    const std::vector<std::string>& overrides = {});
// The resolved recipe as YAML: reading it again gives the same recipe.
std::string dump_recipe(const Recipe& recipe);
// docs/recipe.md, generated.
std::string recipe_reference();

}  // namespace caldera
