"""``python -m trainer_patches SCRIPT ARGS...``: what ``python SCRIPT ARGS...`` does, with the patches in place."""

from __future__ import annotations

import os
import runpy
import sys

USAGE = """\
usage: python -m trainer_patches SCRIPT [ARGS...]

Runs a Hugging Face Trainer script, unmodified, with the rotational optimizers among the values of --optim:

  python -m trainer_patches run_clm.py --model_name_or_path gpt2 ... --optim rotational_adamw
  torchrun --nproc_per_node 2 -m trainer_patches run_clm.py ... --optim rotational_adamw

Their options ride on the Trainer's own --optim_args:

  --optim_args "rotation=match,centering=updates"

Arguments after SCRIPT are the script's own. Without a rotational --optim the script runs as it would by itself.
"""


def main() -> None:
    """Run the script named on the command line; its exit status is ours, and 2 means that it could not be started."""
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(USAGE)
        sys.exit(2)
    if arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        sys.exit(0)

    script = arguments[0]
    if not os.path.isfile(script):
        _refuse(f"no such script: {script}")

    from trainer_patches.compat import UnsupportedTransformersError
    from trainer_patches.patches import apply

    try:
        apply()
    except UnsupportedTransformersError as error:
        _refuse(str(error))

    sys.argv = arguments
    # `python -m` put the working directory first on the path; `python SCRIPT` puts the script's. Under -P neither does.
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")


def _refuse(reason: str) -> None:
    sys.stderr.write(f"trainer_patches: {reason}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
