"""Lets unmodified Trainer scripts use the rotational optimizers.

From the command line, with the script's own arguments::

    python -m trainer_patches run_clm.py ... --optim rotational_adamw --rotation match --rotation_centering updates
    hf-rotational run run_clm.py ...   # the same

The fields of :class:`~hf_rotational.RotationalTrainingArguments` are arguments of the script: in its ``--help``, and in
the JSON or YAML file it reads. From Python, before argument parsers and ``TrainingArguments`` are built::

    import trainer_patches

    trainer_patches.apply()
"""

from trainer_patches.patches import apply, patched, revert

__all__ = ["apply", "patched", "revert"]
