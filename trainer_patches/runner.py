"""Runs a script as ``python SCRIPT ARGS...`` does, with the patches in place."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

import torch

from hf_rotational.errors import UserError


def run_script(script: str, arguments: Sequence[str] = ()) -> None:
    """Run ``script`` as ``__main__`` in this process, which stays as the script leaves it but for its process group.

    Args:
        script: path of the script.
        arguments: what it finds in ``sys.argv`` after its own name.

    Raises:
        UserError: if there is no such script, the installed Transformers cannot be patched, or a rotational setting
            of the script's cannot be used.
    """
    if not os.path.isfile(script):
        raise UserError(f"no such script: {script}")

    from hf_rotational.compat import UnsupportedTransformersError
    from trainer_patches.patches import apply

    try:
        apply()
    except UnsupportedTransformersError as error:
        raise UserError(str(error)) from None

    sys.argv = [script, *arguments]
    # Python put the working directory first on the path (after -m) or the folder of the command; for a script it puts
    # the script's. Under -P it puts none.
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")
    # Trainers leave their process group as it is. On CPUs its threads may then abort a rank whose work is all done, and
    # with it the launcher, while the interpreter ends.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
