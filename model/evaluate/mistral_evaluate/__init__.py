"""Evaluation of a model behind an OpenAI endpoint, with the tasks and metrics of lm-eval."""
