#!/usr/bin/env python3
"""The checks of layers and style find what they are there to find."""
import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import check_layers  # noqa: E402
import check_style  # noqa: E402


def layers(path, *lines):
    return [what for _, what in check_layers.faults_of(pathlib.Path(path), "\n".join(lines))]


def style(path, text):
    return [what for _, what in check_style.faults_of(pathlib.Path(path), text.encode())]


class Layers(unittest.TestCase):
    def test_down_the_house(self):
        self.assertEqual(layers("train/x.cpp", '#include "train/recipe.h"', '#include "model/llava.h"', "#include <vector>"), [])
        self.assertEqual(layers("tests/base/x.cpp", '#include "train/recipe.h"'), [])

    def test_up_the_house(self):
        self.assertRegex(layers("base/x.h", '#include "model/llava.h"')[0], r"base/ may not include")
        self.assertRegex(layers("train/x.h", '  #  include "eval/score.h"')[0], r"may from train, base, model, data")

    def test_model_and_data_do_not_see_each_other(self):
        self.assertEqual(len(layers("model/x.h", '#include "data/record.h"')), 1)
        self.assertEqual(len(layers("data/x.h", '#include "model/llava.h"')), 1)

    def test_form_of_includes(self):
        self.assertRegex(layers("train/x.h", '#include "recipe.h"')[0], "root-relative")
        self.assertRegex(layers("train/x.h", "#include <train/recipe.h>")[0], 'as "train/recipe.h"')
        self.assertRegex(layers("model/x.h", "#include <torch/torch.h>")[0], "too long to compile")


class Style(unittest.TestCase):
    def test_right(self):
        self.assertEqual(style("base/x.h", "#pragma once\nint x;\n"), [])

    def test_each_fault(self):
        self.assertRegex(style("base/x.h", "int x;\n")[0], "#pragma once")
        self.assertRegex(style("base/x.cpp", "int x;\n" * 501)[0], "501 lines")
        self.assertRegex(style("base/x.cpp", "int x;  // TO" "DO: y\n")[0], "unfinished")
        self.assertRegex(style("base/x.cpp", "int x; \n")[0], "white space")
        self.assertRegex(style("base/x.cpp", "\tint x;\n")[0], "a tab")
        self.assertRegex(style("base/x.cpp", "int x;")[0], "does not end")
        self.assertEqual(list(check_style.faults_of(pathlib.Path("x.cpp"), b"// \xff\n")), [(1, "not UTF-8")])


if __name__ == "__main__":
    unittest.main()
