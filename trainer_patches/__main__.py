"""``python -m trainer_patches SCRIPT ARGS...``: what ``python SCRIPT ARGS...`` does, with the patches in place."""

from __future__ import annotations

import sys

from hf_rotational.errors import UserError
from trainer_patches.runner import run_script

USAGE = """\
usage: python -m trainer_patches SCRIPT [ARGS...]

Runs a Hugging Face Trainer script, unmodified, with the rotational optimizers among the values of --optim and their
settings among its arguments (--help of the script lists them):

  python -m trainer_patches run_clm.py --model_name_or_path gpt2 ... --optim rotational_adamw --rotation match
  torchrun --nproc_per_node 2 -m trainer_patches run_clm.py ... --optim rotational_adamw
  python -m trainer_patches run_clm.py ... --weight_standardization drop_mean

Arguments after SCRIPT are the script's own. Without a rotational --optim and --weight_standardization the script trains
as it would by itself. `hf-rotational run SCRIPT [ARGS...]` is the same.
"""


def main() -> None:
    """Run the script named on the command line; its exit status is ours, and 2 means that it could not be run so."""
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(USAGE)
        sys.exit(2)
    if arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        sys.exit(0)
    try:
        run_script(arguments[0], arguments[1:])
    except UserError as error:
        sys.stderr.write(f"trainer_patches: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
