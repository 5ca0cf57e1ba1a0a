// A sheet of held-out pictures with questions and answers.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "eval/heldout.h"

namespace caldera {

// At most `num` answers with a picture, spread over the types and over different pictures; the same for the
// same answers.
std::vector<HeldoutAnswer> choose_for_sheet(const std::vector<HeldoutAnswer>& answers, int64_t num);

// The picture, at most `max_px` on its longer edge, as a PNG (small ones) or JPEG file's bytes; returns its
// MIME type in `mime`.
std::string thumbnail(const std::filesystem::path& file, int64_t max_px, std::string& mime);

// A PNG: a grid of the pictures, each with its question, the given answer, and the expected one where they
// differ.
void write_sheet(const std::filesystem::path& file, const std::vector<HeldoutAnswer>& answers,
                 const std::filesystem::path& image_folder);

}  // namespace caldera
