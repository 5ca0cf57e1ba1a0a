// A low-rank adapter: as PEFT's folder, or merged into a model that transformers loads.
#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "cli/export.h"
#include "model/weights/adapters.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

void check_peft(const ExportOptionsGiven& given) {
  check_part(given, {"language_model"});
  float_dtype(given.dtype);
}

void write_merged(const ExportJob& job, const fs::path& folder) { kExportHf.write(job, folder); }

// What is known of the adapter besides its tensors; an empty object where nothing is.
Json read_card(const fs::path& source) {
  for (const fs::path& file : {source / "adapter" / "caldera.json", source / "caldera.json"})
    if (fs::exists(file)) return read_config(file);
  return Json::object();
}

// The folder that PEFT is to load first: a whole model, or the decoder alone.
std::string base_of(const ExportOptionsGiven& given, const Adapter& adapter, const Json& caldera) {
  if (!given.model_base.empty()) return fs::absolute(given.model_base).string();
  if (given.part.empty()) return adapter.base_model;
  return caldera.contains("build") ? build_spec_from_json(caldera["build"], given.model).language_model : "";
}

}  // namespace

void export_adapter(const ExportOptionsGiven& given) {
  check_peft(given);
  check_export_folder(given.out);
  const fs::path source = resolve_model_folder(given.model);
  Adapter adapter = read_adapter(source);
  Json caldera = read_card(source);
  adapter.base_model = base_of(given, adapter, caldera);
  if (adapter.base_model.empty()) {
    log_warning(
        "{}: the adapter names no base model; PEFT needs it by hand, or name it here with --model-base",
        given.out);
  } else {  // how to build a base stays with the adapter only where it names none
    caldera.erase("build");
    caldera.erase("tokenizer");
  }
  write_export(given, [&](const fs::path& folder) {
    write_peft_adapter(adapter, /*for_decoder=*/!given.part.empty(), float_dtype(given.dtype), folder);
    if (!caldera.empty()) write_json(folder / "caldera.json", caldera);
  });
}

const ExportFormat kExportPeft = {.name = "peft",
                                  .help = "the adapter of a LoRA stage as PEFT loads it; with --merge as hf",
                                  .check = check_peft,
                                  .write = write_merged};

}  // namespace caldera
