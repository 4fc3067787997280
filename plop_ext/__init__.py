"""PLoP: where in this model should LoRA go for this task?"""
