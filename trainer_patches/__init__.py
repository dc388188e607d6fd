"""Lets unmodified Trainer scripts use the rotational optimizers.

From the command line, with the script's own arguments::

    python -m trainer_patches run_clm.py ... --optim rotational_adamw --optim_args "rotation=match,centering=updates"

From Python, before ``TrainingArguments`` are built::

    import trainer_patches

    trainer_patches.apply()
"""

from trainer_patches.patches import apply, patched, revert

__all__ = ["apply", "patched", "revert"]
