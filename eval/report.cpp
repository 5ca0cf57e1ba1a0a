#include "eval/report.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "base/strings.h"
#include "data/record.h"
#include "eval/html.h"
#include "eval/model_session.h"
#include "eval/report_style.h"
#include "eval/sheet.h"
#include "train/run.h"

namespace caldera {
namespace {

constexpr int64_t kThumbnail_px = 320;

struct StageCurve {
  std::string name;
  Chart::Points loss, eval_loss;
  double seconds = 0, tokens = 0;
};

double number(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_number() ? found->get<double>()
                                                   : std::numeric_limits<double>::quiet_NaN();
}

StageCurve read_curve(const fs::path& output, const std::string& stage) {
  StageCurve curve{.name = stage};
  const fs::path file = output / stage / "metrics.jsonl";
  if (!fs::exists(file)) return curve;
  std::istringstream lines(read_file(file));
  for (std::string line; std::getline(lines, line);) {
    const Json json = json_or_null(line);
    if (!json.is_object()) continue;  // the last line of a run that was cut off
    const double step = number(json, "step");
    if (json.contains("eval_loss")) curve.eval_loss.emplace_back(step, number(json, "eval_loss"));
    if (!json.contains("loss")) continue;
    curve.loss.emplace_back(step, number(json, "loss"));
    const double step_ms = number(json, "step_ms"), tokens = number(json, "num_tokens");
    if (step_ms > 0) curve.seconds += step_ms / 1000;
    if (tokens > 0) curve.tokens += tokens;
  }
  return curve;
}

std::string percent(double share) { return fmt::format("{:.1f} %", 100 * share); }

std::string tile(const std::string& value, const std::string& label) {
  return fmt::format("<div class=\"tile\"><b>{}</b><span>{}</span></div>", escape_html(value),
                     escape_html(label));
}

std::string tiles(const Report& report) {
  const HeldoutResult& result = *report.result;
  std::string html = "<div class=\"tiles\">";
  if (result.all.num_questions > 0) {
    html += tile(percent(result.all.exact_match()),
                 fmt::format("of {} held-out questions right", result.all.num_questions));
    html += tile(percent(result.all.exact_match_blind()), "at best without looking");
  }
  if (result.nll_right)
    html += tile(fmt::format("{:.3f}", *result.nll_right), "nats per token, right picture");
  if (result.nll_shuffled)
    html += tile(fmt::format("{:.3f}", *result.nll_shuffled), "nats per token, another picture");
  if (report.train_seconds > 0) html += tile(human_duration(report.train_seconds), "of training");
  return html + "</div>";
}

std::string charts(const std::vector<StageCurve>& curves) {
  std::string html;
  for (const StageCurve& curve : curves) {
    const std::string svg = svg_chart({.line = curve.loss,
                                       .dots = curve.eval_loss,
                                       .line_label = "training loss, nats per token",
                                       .dots_label = "held-out loss",
                                       .x_label = "step"});
    if (svg.empty()) continue;
    std::string caption = fmt::format("<b>{}</b>", escape_html(curve.name));
    if (!curve.loss.empty()) {
      caption += fmt::format(" &middot; {:.0f} steps &middot; last loss {:.3f}", curve.loss.back().first,
                             curve.loss.back().second);
    }
    if (curve.seconds > 0)
      caption += fmt::format(" &middot; {} &middot; {:.0f} tokens/s", human_duration(curve.seconds),
                             curve.tokens / curve.seconds);
    html += fmt::format("<figure><figcaption>{}</figcaption>{}</figure>", caption, svg);
  }
  return html.empty() ? "" : "<h2>Training</h2><div class=\"charts\">" + html + "</div>";
}

std::string table_row(const std::string& name, const Tally& tally, bool is_total) {
  return fmt::format(
      "<tr{}><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td><div class=\"bar\"><i "
      "style=\"width:{:.1f}%\"></i>"
      "<u style=\"left:{:.1f}%\"></u></div></td></tr>",
      is_total ? " class=\"total\"" : "", escape_html(name), tally.num_questions,
      percent(tally.exact_match()), percent(tally.exact_match_blind()), 100 * tally.exact_match(),
      100 * tally.exact_match_blind());
}

std::string table(const HeldoutResult& result) {
  if (result.all.num_questions == 0) return "";
  std::string html =
      "<h2>Held-out questions</h2><div class=\"scroll\"><table><tr><th></th><th>questions</th><th>right</th>"
      "<th>without looking</th><th></th></tr>";
  for (const auto& [type, tally] : result.by_type)
    html += table_row(replace_all(type, "_", " "), tally, false);
  for (const auto& [held_out, tally] : result.by_held_out)
    html += table_row(held_out ? "combinations never met in training" : "combinations met in training", tally,
                      false);
  html += table_row("all", result.all, true);
  return html +
         "</table></div><p class=\"faint\">Right: the same words, but for case, spaces and a final period. "
         "Without looking: "
         "the majority answer to each question, marked in the bar; no answer that ignores the picture does "
         "better.</p>";
}

std::string sheet(const Report& report, const std::vector<HeldoutAnswer>& chosen) {
  if (chosen.empty()) return "";
  std::string html = "<h2>Answers to pictures it never saw</h2><div class=\"sheet\">";
  for (const HeldoutAnswer& answer : chosen) {
    std::string mime;
    const std::string bytes = thumbnail(image_path(report.image_folder, answer.image), kThumbnail_px, mime);
    html += fmt::format(
        "<div class=\"item\"><img{} alt=\"{}\" src=\"data:{};base64,{}\"><div><p>{}</p><span class=\"given "
        "{}\">{} "
        "{}</span>",
        mime == "image/png" ? " class=\"small\"" : "", escape_html(answer.id), mime, base64(bytes),
        escape_html(answer.question), answer.is_right ? "right" : "wrong", answer.is_right ? "✓" : "✗",
        escape_html(answer.given.empty() ? "(nothing)" : answer.given));
    if (!answer.is_right) html += fmt::format("<small>expected: {}</small>", escape_html(answer.expected));
    html += "</div></div>";
  }
  return html + "</div>";
}

std::string ask(const Report& report, const HeldoutAnswer& answer) {
  const std::string command =
      fmt::format("build/caldera generate --model {} \\\n  --image {} \\\n  --prompt {}",
                  shell_quote(report.model.string()),
                  shell_quote((report.image_folder / answer.image).string()), shell_quote(answer.question));
  return "<h2>Ask it more</h2><pre>" + escape_html(command) + "</pre>";
}

}  // namespace

void write_report(const Report& report) {
  std::vector<StageCurve> curves;
  for (const std::string& stage : report.stages) curves.push_back(read_curve(report.output, stage));
  std::vector<HeldoutAnswer> chosen;
  if (report.result) chosen = choose_for_sheet(report.result->answers, report.num_sheet);

  std::string html = fmt::format(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width, "
      "initial-scale=1\"><title>{}</title><style>{}</style></head><body>\n<h1>{}</h1>"
      "<p class=\"faint\">{}</p>\n",
      escape_html(report.title), kReportStyle, escape_html(report.title),
      escape_html(report.output.string()));
  if (report.result) html += tiles(report);
  if (report.result) html += table(*report.result);
  html += charts(curves);
  html += sheet(report, chosen);
  if (!chosen.empty()) html += ask(report, chosen.front());
  if (!report.recipe_yaml.empty())
    html += "<details><summary>The recipe, resolved</summary><pre>" + escape_html(report.recipe_yaml) +
            "</pre></details>";
  html += "\n</body></html>\n";
  write_file_atomic(report.output / "report.html", html);
  if (!chosen.empty()) write_sheet(report.output / "sheet.png", chosen, report.image_folder);
}

std::string answers_jsonl(const HeldoutResult& result) {
  std::string lines;
  for (const HeldoutAnswer& answer : result.answers)
    lines += json_line({{"id", answer.id},
                        {"type", answer.type},
                        {"image", answer.image},
                        {"question", answer.question},
                        {"expected", answer.expected},
                        {"given", answer.given},
                        {"right", answer.is_right}}) +
             "\n";
  return lines;
}

std::optional<HeldoutResult> evaluate_run(
    const Recipe& recipe, const std::function<void(const std::string&, int64_t, int64_t)>& progress) {
  const fs::path output = recipe.output;
  Report report{
      .output = output,
      .model = output,
      .title = fmt::format("Caldera: {}", fs::absolute(output).lexically_normal().filename().string()),
      .recipe_yaml = dump_recipe(recipe),
      .train_seconds = train_seconds(recipe)};
  for (const StageConfig& stage : recipe.stages) report.stages.push_back(stage.name);
  if (recipe.evaluation) {
    const EvaluationConfig& config = *recipe.evaluation;
    const HeldoutData data = read_heldout(config);
    ModelSession session = open_model({.model = output,
                                       .conversation_template = config.conversation_template,
                                       .dtype = recipe.stages.back().dtype,
                                       .device = recipe.device});
    report.result = evaluate_heldout(*session.model, session.format, config, data, {.progress = progress});
    report.image_folder = config.image_folder;
    report.num_sheet = config.num_sheet;
    write_json(output / "results.json", to_json(*report.result, report.train_seconds));
    write_file_atomic(output / "answers.jsonl", answers_jsonl(*report.result));
  }
  write_report(report);
  return report.result;
}

}  // namespace caldera
