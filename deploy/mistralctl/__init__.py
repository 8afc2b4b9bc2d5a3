"""Mistral 7B on AWS, GCP, Azure or this machine, in one command."""

__version__ = "0.1.0"
