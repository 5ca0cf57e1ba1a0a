// Every option of a recipe, declared once (see fields.h).
#pragma once
#include "train/fields.h"
#include "train/recipe.h"

namespace caldera {

template <class V>
void fields(V& v, ModelConfig& c) {
  v("vision_tower", c.vision_tower,
    "the image encoder: an HF folder; one with config.json alone gives a fresh tower",
    required(file_or_folder()));
  v("language_model", c.language_model,
    "the decoder: an HF folder or a .gguf file; a folder with config.json alone gives a fresh one",
    required(file_or_folder()));
  v("mm_projector_type", c.mm_projector_type, "`linear`, `mlpNx_gelu` (N layers) or `identity`");
  v("vision_feature_layer", c.vision_feature_layer,
    "which hidden state of the tower is used; -2 is the output of the last block but one",
    range(-1000, 1000));
  v("vision_feature_select_strategy", c.vision_feature_select_strategy,
    "`patch` drops the class token, `cls_patch` keeps it", one_of({"patch", "cls_patch"}));
  v("image_size", c.image_size,
    "pixels along an edge of the pictures that the tower sees; its position embeddings are interpolated to that size; "
    "0: its own",
    range(0, 8192));
  v("pretrain_mm_mlp_adapter", c.pretrain_mm_mlp_adapter,
    "where the projector starts: the original LLaVA's `mm_projector.bin`, or a model's folder; empty: fresh",
    file_or_folder());
  v("tokenizer", c.tokenizer, "folder or .gguf file of the tokenizer; empty: the language model's", file_or_folder());
  v("random_parts", c.random_parts, "parts that may begin at random although a stage does not train them",
    one_of({"vision_tower", "projector", "language_model"}));
}

template <class V>
void fields(V& v, DataConfig& c) {
  v("data_path", c.data_path, "the samples: LLaVA's JSON, or JSONL of the same records",
    required(file_or_folder()));
  v("image_folder", c.image_folder, "folder that the samples' image paths start from", file_or_folder());
  v("image_roots", c.image_roots,
    "folders that links in `image_folder` may lead to (`coco -> /datasets/coco`); other links out are refused");
  v("eval_data_path", c.eval_data_path, "held-out samples for the validation loss; empty: none", file_or_folder());
  v("conversation_template", c.conversation_template,
    "how turns become text, by LLaVA's names (its `--version`): plain, v0, v1, llama_2, chatml, qwen, mpt, llama_3, "
    "mistral_instruct, phi3 (docs/data.md)", required());
  v("image_aspect_ratio", c.image_aspect_ratio,
    "`square` crops the centre, `pad` first pads to a square of the mean colour", one_of({"square", "pad"}));
  v("model_max_length", c.model_max_length,
    "tokens of one sample, image tokens included; the rest is cut off", range(1, 1 << 20));
  v("group_by_modality_length", c.group_by_modality_length,
    "group samples of like length, pictures and text-only apart");
  v("dataloader_num_workers", c.dataloader_num_workers,
    "threads that prepare samples; the order does not depend on it", range(1, 256));
}

template <class V>
void fields(V& v, OptimizerConfig& c) {
  v("optim", c.optim,
    "by HF's names: `adamw_torch`, or `adamw_8bit`, which holds the moments of matrices in 8 bits by rules of its own, "
    "near bitsandbytes' (see docs/memory.md)",
    one_of({"adamw_torch", "adamw_8bit"}));
  v("master_weights", c.master_weights,
    "with `dtype: bfloat16`: `float32` masters beside the weights, or `none`: updates are rounded into the "
    "bfloat16 weights stochastically",
    one_of({"float32", "none"}));
  v("learning_rate", c.learning_rate, "peak learning rate", range(0, 1));
  v("mm_projector_lr", c.mm_projector_lr, "the projector's own; none: `learning_rate`", range(0, 1));
  v("vision_tower_lr", c.vision_tower_lr, "the vision tower's own; none: `learning_rate`", range(0, 1));
  v("weight_decay", c.weight_decay, "AdamW's decoupled weight decay", range(0, 1));
  v("adam_beta1", c.adam_beta1, "decay of the gradient's mean", range_below(0, 1));
  v("adam_beta2", c.adam_beta2, "decay of the squared gradient's mean", range_below(0, 1));
  v("adam_epsilon", c.adam_epsilon, "added to the denominator", above(0));
  v("max_grad_norm", c.max_grad_norm,
    "gradients are scaled down to this norm; 0: never, as LLaVA's runs were", at_least(0));
  v("lr_scheduler_type", c.lr_scheduler_type,
    "course of the learning rate after warm-up, by HF's names; `constant` has no warm-up, whatever `warmup_ratio` says",
    one_of({"cosine", "cosine_with_min_lr", "linear", "constant", "constant_with_warmup"}));
  v("warmup_ratio", c.warmup_ratio, "share of the steps over which the learning rate rises from 0",
    range_below(0, 1));
  v("warmup_steps", c.warmup_steps, "the same as a number of steps; none: by `warmup_ratio`", at_least(1));
  v("min_lr", c.min_lr,
    "with `cosine_with_min_lr`: where `learning_rate` ends; the rates of other parts fall by the same share",
    range(0, 1));
  v("min_lr_rate", c.min_lr_rate, "the same as a share of the peak; one of the two", range(0, 1));
}

template <class V>
void fields(V& v, MemoryConfig& c) {
  v("budget_gb", c.budget_gb,
    "peak memory that the stage may take on each rank, in 10^9 bytes: as many MLPs, then whole blocks recompute "
    "as `caldera plan` says it takes, and on a GPU their inputs move to host memory last of all; same numbers. 0: no "
    "budget",
    at_least(0));
  v("offload_optimizer", c.offload_optimizer,
    "on a GPU: masters and moments stay in host memory, and the update runs there");
  v("offload_activations", c.offload_activations,
    "on a GPU: what a block that recomputes keeps, its input, waits for the backward pass in host memory; needs "
    "`gradient_checkpointing` or `budget_gb`; same numbers");
}

template <class V>
void fields(V& v, LoraOptions& c) {
  v("lora_enable", c.lora_enable, "`false`: the block counts for nothing");
  v("lora_r", c.lora_r, "rank of the adapters", range(1, 65536));
  v("lora_alpha", c.lora_alpha, "an adapter's output is scaled by this over `lora_r`", above(0));
  v("lora_dropout", c.lora_dropout, "share of the adapters' inputs that is zeroed in training", range_below(0, 1));
  v("lora_bias", c.lora_bias, "biases stay as they are", one_of({"none"}));
  v("use_rslora", c.use_rslora, "scale by `lora_alpha` over the square root of `lora_r`");
  v("load_in_4bit", c.load_in_4bit,
    "QLoRA: the weights of the decoder's linear layers are held as 4-bit NormalFloat, as bitsandbytes does (see "
    "docs/lora.md)");
  v("double_quant", c.double_quant, "with `load_in_4bit`: the scales of the blocks are held in 8 bits");
  v("target_modules", c.target_modules, "the linear layers that get adapters; empty: all seven",
    one_of({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}));
}

template <class V>
void fields(V& v, StageConfig& c) {
  v("name", c.name, "names the stage's folder and stands for it in overrides: letters, digits, `_` and `-`",
    required());
  v("trainable", c.trainable, "the parts that learn; the others stay as they are",
    required(one_of({"projector", "language_model", "vision_tower"})));
  v("lora", c.lora, "the language model learns through low-rank adapters, as PEFT's; its own weights stay as they are");
  v("data", c.data, "what it learns from", required());
  v("optimizer", c.optimizer, "AdamW and its schedule");
  v("memory", c.memory, "what is done to take less memory (see docs/memory.md)");
  v("global_batch_size", c.global_batch_size, "samples of one step, over all ranks and micro-batches",
    range(1, 1 << 20));
  v("max_tokens_per_micro_batch", c.max_tokens_per_micro_batch,
    "a micro-batch is filled up to this many tokens: more takes more memory; with `token_mean` it changes "
    "nothing but rounding",
    range(1, 1 << 24));
  v("num_train_epochs", c.num_train_epochs, "passes over the data; may be a fraction", above(0));
  v("max_steps", c.max_steps, "above 0: exactly this many steps, whatever `num_train_epochs` says",
    at_least(0));
  v("loss", c.loss,
    "`token_mean`: over all supervised tokens of the step; `micro_batch_mean`: LLaVA's, mean of the "
    "micro-batches' means",
    one_of({"token_mean", "micro_batch_mean"}));
  v("dtype", c.dtype,
    "of weights and activations in the computation; beside `bfloat16` ones see `optimizer.master_weights`. `auto`: what "
    "the machine on which the stage begins computes fastest (`bfloat16` on GPUs and on processors that multiply it faster "
    "than float32)",
    one_of({"float32", "bfloat16", "auto"}));
  v("float8", c.float8,
    "with `dtype: bfloat16`: the products of the decoder's linear layers, forward and backward, in 8-bit floats, as "
    "torchao's rowwise recipe (see docs/performance.md)");
  v("gradient_checkpointing", c.gradient_checkpointing,
    "recompute all blocks in the backward pass: less memory, same numbers");
  v("save_steps", c.save_steps, "steps between checkpoints; 0: only at the end", at_least(0));
  v("save_total_limit", c.save_total_limit, "checkpoints kept, the newest ones", at_least(1));
  v("save_best", c.save_best,
    "also keep the checkpoint with the lowest validation loss so far; needs `save_steps` to be a multiple of "
    "`eval_steps`");
  v("async_save", c.async_save, "write checkpoints in the background, beside the next steps; the same bytes");
  v("eval_steps", c.eval_steps, "steps between validation losses; 0: only at the end", at_least(0));
}

template <class V>
void fields(V& v, EvaluationConfig& c) {
  v("data_path", c.data_path,
    "questions: records of one human turn and the expected answer, with a `type` for the table",
    required(file_or_folder()));
  v("captions_path", c.captions_path,
    "held-out samples for the loss with the right picture and with another's; empty: `data_path`",
    file_or_folder());
  v("image_folder", c.image_folder, "folder that the records' image paths start from", file_or_folder());
  v("conversation_template", c.conversation_template, "how questions are put; as in `stages.NAME.data`",
    required());
  v("max_questions", c.max_questions, "at most so many are asked, drawn evenly from the file", at_least(1));
  v("max_new_tokens", c.max_new_tokens, "longest answer, in tokens", at_least(1));
  v("num_sheet", c.num_sheet, "pictures on the sheet of examples", range(0, 1000));
}

template <class V>
void fields(V& v, DistributedConfig& c) {
  v("strategy", c.strategy,
    "`ddp`: every rank holds all; `zero1`: each holds its part of the optimizer's state; `zero2`: and of the gradients; "
    "`zero3`: and of the weights of the decoder's blocks",
    one_of({"ddp", "zero1", "zero2", "zero3"}));
  v("shard_within", c.shard_within,
    "how far parts are spread with `zero1` to `zero3`: over all ranks (`world`), or over those of a machine "
    "(`node`), of which each then holds all parts and only sums of gradients go between machines",
    one_of({"world", "node"}));
  v("reduce_dtype", c.reduce_dtype, "in which gradients are summed over the ranks; `bfloat16` halves what is sent",
    one_of({"float32", "bfloat16"}));
  v("timeout_s", c.timeout_s, "seconds after which a rank that is silent or stuck ends the run, with its name", above(0));
}

template <class V>
void fields(V& v, Recipe& c) {
  v("model", c.model, "the parts that training starts from", required());
  v("stages", c.stages, "what is trained, in order; each starts from what the ones before it made",
    required());
  v("evaluation", c.evaluation, "what is measured at the end; left out: nothing");
  v("distributed", c.distributed, "how several processes share the work (see docs/distributed.md)");
  v("output", c.output, "the run's folder", required(file_or_folder()));
  v("seed", c.seed, "of sample order and of whatever is initialised anew");
  v("device", c.device, "`auto`: CUDA where there is a GPU, else the CPU", one_of({"auto", "cpu", "cuda"}));
}

}  // namespace caldera
