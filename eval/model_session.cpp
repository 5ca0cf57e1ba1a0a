#include "eval/model_session.h"

#include "base/cpu_allocator.h"
#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "model/weights/gguf_llava.h"
#include "model/weights/json_fields.h"
#include "train/trainer.h"

namespace caldera {
namespace {

const ConversationTemplate* choose_template(const std::string& asked, const ModelCard& card,
                                            const Tokenizer& tokenizer) {
  if (!asked.empty()) return &find_template(asked);
  if (!card.conversation_template.empty()) return &find_template(card.conversation_template);
  return &template_of(tokenizer);
}

Json read_json_or_empty(const fs::path& file) {
  if (!fs::exists(file)) return Json::object();
  Json json;
  try {
    json = read_json(file);
  } catch (const Error& error) {
    throw CheckpointError(error.what());
  }
  CALDERA_CHECK(json.is_object(), CheckpointError, "{}: expected a JSON object", file.string());
  return json;
}

}  // namespace

fs::path tokenizer_path(const fs::path& folder) {
  if (fs::exists(folder / "tokenizer.model") || fs::exists(folder / "tokenizer.json")) return folder;
  if (const auto gguf = find_gguf_llava(folder)) return gguf->decoder;
  const fs::path file = folder / "caldera.json";
  const Json caldera = read_json_or_empty(file);
  const std::string named = text_field(caldera, file.string(), "tokenizer", "");
  if (!named.empty()) return named;
  if (!caldera.contains("build")) return folder;
  return build_spec_from_json(caldera["build"], file.string()).language_model;
}

ModelSession open_model(const SessionOptions& options) {
  CALDERA_CHECK(options.device == "auto" || options.device == "cpu" || options.device == "cuda", ConfigError,
                "device \"{}\": expected auto, cpu or cuda", options.device);
  const at::Device device = choose_device(options.device);
  const bool int8 = options.dtype == "int8";
  CALDERA_CHECK(options.dtype == "auto" || options.dtype == "float32" || options.dtype == "bfloat16" || int8,
                ConfigError, "dtype \"{}\": expected auto, float32, bfloat16 or int8", options.dtype);
  CALDERA_CHECK(!int8 || device.is_cpu(), ConfigError, "dtype int8 runs on the CPU: add --device cpu");
  const at::ScalarType dtype = int8                      ? at::kFloat
                               : options.dtype == "auto" ? (device.is_cuda() ? at::kBFloat16 : at::kFloat)
                                                         : parse_dtype(options.dtype);
  if (!options.conversation_template.empty())
    find_template(options.conversation_template);  // fails before loading

  LoadedModel loaded = load_llava(options.model, options.model_base);
  ModelSession session{std::move(loaded.model), std::move(loaded.card), std::move(loaded.folder), {}};
  SampleFormat& format = session.format;
  format.tokenizer = load_tokenizer(tokenizer_path(session.folder));
  format.conversation = choose_template(options.conversation_template, session.card, *format.tokenizer);
  format.image_spec = session.model->image_spec();
  format.image_aspect_ratio = session.card.image_aspect_ratio;
  format.model_max_length = session.model->language->max_position_embeddings();
  session.model->to(device, dtype);
  set_trainable(session.model->tensors(), false);
  if (int8) session.model->language->quantize_int8();
  settle_cpu_memory();
  return session;
}

TextSession open_text(const fs::path& folder, const std::string& conversation_template) {
  CALDERA_CHECK(fs::exists(folder), CheckpointError, "{}: no such model or tokenizer folder",
                folder.string());
  // A tokenizer's own folder (or .gguf) is no model; take it as it is.
  const bool is_model = fs::exists(folder / "config.json") || fs::exists(folder / "caldera.json") || find_gguf_llava(folder);
  const bool has_tokenizer = fs::exists(folder / "tokenizer.model") || fs::exists(folder / "tokenizer.json");
  const bool is_tokenizer = !fs::is_directory(folder) || (has_tokenizer && !is_model);
  const fs::path resolved = is_tokenizer ? folder : resolve_model_folder(folder);
  TextSession session;
  if (!is_tokenizer) {
    session.card = read_model_card(resolved);
    session.image_spec = read_image_spec(resolved);
  }
  SampleFormat& format = session.format;
  format.tokenizer = load_tokenizer(tokenizer_path(resolved));
  format.conversation = choose_template(conversation_template, session.card, *format.tokenizer);
  if (session.image_spec) format.image_spec = *session.image_spec;
  format.image_aspect_ratio = session.card.image_aspect_ratio;
  return session;
}

}  // namespace caldera
