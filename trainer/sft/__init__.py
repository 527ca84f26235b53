"""Fine-tuning on experts' answers (`algorithm: sft`), the baseline of distillation.

`settings.py` is what a recipe says and what makes no sense beside it, `rows.py` the rows of `polyphony sample` that become
token ids, `trainer.py` TRL's SFTTrainer with a run's evaluations, checkpoints and folder.
"""
