#!/usr/bin/env bash
# Makes the small base models in checkpoints/scenes anew (about half an hour on two cores): data, tokenizer, training,
# export. Needs Debian's package `sentencepiece` for spm_train. Run it in the repository's root after scripts/setup.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
caldera=${CALDERA:-build/caldera}
data=data-cache/scenes-base
[ -e $data/boxes.json ] || $caldera data make-scenes --out $data --num-train 60000 --num-test 500 --seed 1

# LLaMA's tokenizer settings on the texts of the scenes and the v1 system prompt.
fresh=checkpoints/scenes/fresh
if [ ! -e $fresh/language_model/tokenizer.model ]; then
  python3 - $data/{base_captions,finetune}.json > $data/corpus.txt <<'PY'
import json, sys
# The system prompt stands before every conversation: often enough here that it takes few tokens.
system = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
          "and polite answers to the user's questions. USER: ASSISTANT:")
for path in sys.argv[1:]:
    for i, record in enumerate(json.load(open(path))):
        if i % 5 == 0:
            print(system)
        for turn in record["conversations"]:
            print(turn["value"].replace("<image>", " ").strip())
PY
  spm_train --input=$data/corpus.txt --model_prefix=$data/tokenizer --model_type=bpe --vocab_size=640 \
    --byte_fallback=true --split_digits=true --add_dummy_prefix=true --remove_extra_whitespaces=false \
    --normalization_rule_name=identity --character_coverage=1.0 --hard_vocab_limit=false --num_threads=1
  cp $data/tokenizer.model $fresh/language_model/tokenizer.model
  printf '{\n  "tokenizer_class": "LlamaTokenizer",\n  "legacy": false,\n  "add_bos_token": true,\n  "add_eos_token": false\n}\n' \
    > $fresh/language_model/tokenizer_config.json
fi

$caldera train checkpoints/scenes/base.yaml
for part in vision_tower language_model; do
  rm -rf checkpoints/scenes/$part
  $caldera export --model output/scenes-base --format hf --part $part --dtype bf16 --out checkpoints/scenes/$part
done
du -sh checkpoints/scenes/vision_tower checkpoints/scenes/language_model
