// The formats of `caldera export`: each is one file that defines an ExportFormat, and one line in
// cli/export.cpp.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "data/tokenizer.h"
#include "model/weights/load.h"

namespace caldera {

// What the command line says.
struct ExportOptionsGiven {
  std::string model, format = "hf", out, dtype = "f32", part, conversation_template;
  std::string mm_vision_tower;  // of --format llava
  std::string model_base;       // of an adapter
  bool merge = false;           // of --format peft
  int64_t max_shard_bytes = 5'000'000'000;
};

// A model ready to be written.
struct ExportJob {
  const ExportOptionsGiven& given;
  LoadedModel& loaded;
  TensorValues values;  // of loaded.model, whose own memory is not set where this is not empty
  const Tokenizer& tokenizer;
  std::string chat_template;  // Jinja; "" where there is none
};

struct ExportFormat {
  const char* name;
  const char* help;  // one line
  // Refuses (ConfigError) what the format cannot hold, of the command line alone: before anything is loaded.
  void (*check)(const ExportOptionsGiven& given);
  // Writes all files into an existing folder that nobody sees yet.
  void (*write)(const ExportJob& job, const std::filesystem::path& folder);
};

extern const ExportFormat kExportHf, kExportLlava, kExportPeft, kExportGguf;

// --format peft without --merge: the adapter alone, which needs no model.
void export_adapter(const ExportOptionsGiven& given);

// Refuses (ConfigError) an --out that holds anything but an earlier export.
void check_export_folder(const std::string& out);
// Writes --out as a whole: what fill() writes, and export.json, by which a later export knows that it may
// replace the folder.
void write_export(const ExportOptionsGiven& given,
                  const std::function<void(const std::filesystem::path&)>& fill);

// --dtype of the formats without quantised types. Throws ConfigError.
at::ScalarType float_dtype(const std::string& name);
// Throws ConfigError unless --part is empty or one of `parts`.
void check_part(const ExportOptionsGiven& given, const std::vector<std::string>& parts);

}  // namespace caldera
