#!/bin/sh
# What stage 1 of Long-VITA starts from: a language model, a vision tower, a fresh projector.
#
#   examples/convert/long_vita_start.sh 14b Qwen2.5-14B-Instruct InternViT-300M-448px-V2_5
#
# Then: torchrun ... pretrain_vita.py examples/long_vita/14b/stage1.yaml
set -eu
exec python -m megatron_vita.convert from-hf "$2" "$3" "checkpoints/long_vita_$1_start" --projector long_vita --verify
