// caldera recipe check RECIPE.yaml [key.path=value ...]; caldera recipe reference
#include "train/recipe.h"

#include <cstdio>
#include <memory>

#include "cli/command.h"

namespace caldera {

void setup_recipe(CLI::App& command) {
  struct CheckCommand {
    std::string recipe;
    std::vector<std::string> overrides;
  };
  command.require_subcommand(1);
  auto options = std::make_shared<CheckCommand>();
  CLI::App* check = command.add_subcommand("check", "read a recipe and print it resolved");
  check->add_option("recipe", options->recipe, "the recipe, a YAML file")->required();
  check->add_option("overrides", options->overrides,
                    "settings that replace the recipe's, as stages.finetune.max_steps=10");
  check->callback(
      [options] { fmt::print("{}", dump_recipe(read_recipe(options->recipe, options->overrides))); });
  command.add_subcommand("reference", "print every setting of a recipe, as Markdown")->callback([] {
    fmt::print("{}", recipe_reference());
  });
}

}  // namespace caldera
