"""Train a stage from a checkout: torchrun --nproc_per_node GPUS pretrain_vita.py RECIPE.yaml
[group.field=value ...]; the same as `vita train`."""

import sys

from megatron_vita.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], name="pretrain_vita.py"))
